"""The `tunesmith` command: one word a verb, each a thin view of a flow or a function.

Exit codes: 0 done, 1 failed, 2 wrong input, 130/143 stopped and resumable.
"""

from __future__ import annotations

import signal
import sys

from cyclopts import CycloptsError

from flows.verbs import (  # noqa: F401  (each adds its verbs)
    data,
    estimate,
    export,
    judge,
    look,
    operate,
    search,
    ship,
    start,
    train,
)
from flows.verbs.frame import app, explain


def main() -> None:
    """Run the command line and exit with its code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run(arguments, debug="--debug" in sys.argv[1:]))


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command; its exit code. With `debug`, exceptions are raised instead of explained."""
    from tasks.errors import InputError, StepError

    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(arguments, exit_on_error=False, result_action="return_none")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return explain("stopped; what was finished is kept, and the same command goes on from there", 130)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except (InputError, StepError) as error:
        if debug:
            raise
        return explain(str(error), 2 if isinstance(error, InputError) else 1)
    except Exception as error:
        if debug:
            raise
        message = str(error).strip().split("\n")[0]
        return explain(f"{type(error).__name__}: {message} (--debug shows where)", 1)
    return 0


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
