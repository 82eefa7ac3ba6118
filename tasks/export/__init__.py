"""Export: what a run has made, in the layouts of other tools, with a card that says what it is."""
