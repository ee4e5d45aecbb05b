"""`report`: a page of an evaluation."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mixwright.cli.output import Json, console, example, print_json

_EXAMPLE = (
    "mixwright eval composed --data held-out.jsonl --json > scores.json",
    "mixwright report scores.json --output scores.html",
    "wrote scores.html: open it in a browser",
)
_LIMIT = 64 * 2**20


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("report", rich_help_panel="Look at the result", epilog=example(*_EXAMPLE))(report)


def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `mixwright eval ... --json` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; SCORES with .html by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page of an evaluation: scores with intervals, routing statistics, cost."""
    from mixwright.files import write_atomic
    from mixwright.report.run_page import run_page

    page = output or scores.with_suffix(".html")
    write_atomic(page, run_page(_read(scores)).encode("utf-8"))
    if as_json:
        print_json({"page": str(page), "bytes": page.stat().st_size})
        return
    console().print(f"wrote {page}: open it in a browser", markup=False)


def _read(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_LIMIT} are read.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is no JSON ({str(error)[:120]}); expected what `mixwright eval ... --json` writes."
        ) from None
    if isinstance(results, list):
        return {"records": results}
    if not isinstance(results, dict):
        raise ValueError(f"{path} holds no object; expected what `mixwright eval ... --json` writes.")
    return results
