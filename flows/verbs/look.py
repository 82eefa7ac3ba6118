"""Look: what was found out."""

from __future__ import annotations

from flows.verbs.frame import LOOK, Config, advised_screen, app, load


@app.command(group=LOOK)
def ui(config: Config | None = None, /, *, port: int = 5000) -> None:
    """Open the MLflow UI on this machine: runs, curves, comparisons, registered models."""
    from flows.ui import open_ui
    from tasks.tracking import send_leftovers, tracking_uri

    uri = tracking_uri(load(config, []).tracking)
    with advised_screen():
        send_leftovers(uri)
        open_ui(port, uri)
