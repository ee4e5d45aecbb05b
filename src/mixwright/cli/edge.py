"""The outer edge: what goes wrong inside becomes one clear message and an exit code that means something."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from mixwright.errors import CatalogError, MissingExtra

BAD_INPUT = 2
REFUSED = 3
OTHER = 1
INTERRUPTED = 130


def run_at_edge(app: Callable[..., Any]) -> None:
    """Run a command; a refusal, a caller's mistake or an interruption ends it with a message instead of a traceback.

    With `--json` on the command line the message is an object `{"error": {"code", "where", "message"}}` on standard
    output. `MIXWRIGHT_TRACEBACK=1` shows the traceback as well.
    """
    try:
        if _for_machines():
            sys.exit(_call(app))
        app()
    except KeyboardInterrupt:
        _say("INTERRUPTED", "", "stopped")
        sys.exit(INTERRUPTED)
    except CatalogError as error:
        _leave(error, error.code, error.where, error.message, REFUSED)
    except MissingExtra as error:
        _leave(error, "EXTRA", error.extra, str(error), OTHER)
    except BrokenPipeError:
        # The reader has gone, as with `| head`; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OTHER)
    except ValueError as error:
        _leave(error, "INPUT", "", str(error), BAD_INPUT)
    except OSError as error:
        _leave(error, "FILE", str(error.filename or ""), error.strerror or str(error), OTHER)


def _for_machines() -> bool:
    return "--json" in sys.argv


def _call(app: Callable[..., Any]) -> int:
    """Run the app so that a wrong option, too, comes out as JSON; typer would draw a box around it."""
    try:
        return app(standalone_mode=False) or 0
    except Exception as error:
        # typer keeps its usage errors in a private module; this is what sets them apart.
        if not hasattr(error, "format_message"):
            raise
        _say("USAGE", "", error.format_message())  # pyright: ignore[reportAttributeAccessIssue]  asked for above
        return BAD_INPUT


def _leave(error: Exception, code: str, where: str, message: str, status: int) -> None:
    if os.environ.get("MIXWRIGHT_TRACEBACK"):
        raise error
    _say(code, where, "\n".join((message, *getattr(error, "__notes__", ()))))
    sys.exit(status)


def _say(code: str, where: str, message: str) -> None:
    if _for_machines():
        print(json.dumps({"error": {"code": code, "where": where, "message": message}}))
        return
    place = f"{where}: " if where else ""
    print(f"mixwright: {code} {place}{message}" if code != "INPUT" else f"mixwright: {message}", file=sys.stderr)
