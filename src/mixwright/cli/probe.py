"""`probe`: which families of language models can be components of a hybrid, tried on tiny random models."""

from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.cli.edge import REFUSED
from mixwright.cli.output import Json, example, print_json, print_table

if TYPE_CHECKING:
    from mixwright.methods.manticore.families import FamilyReport

_EXAMPLE = (
    "mixwright probe gpt_neox",
    "mixwright probe my-backbone --json",
    "mixwright probe --all --report families.json --report families.md",
    "mixwright probe --all --report families.json --resume",
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("probe", rich_help_panel="Look around", epilog=example(*_EXAMPLE))(probe)


def probe(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FAMILY-OR-FOLDER]...", help="Model types of transformers, or models."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every causal family that transformers lists.")] = False,
    limit: Annotated[float, typer.Option("--limit", min=1, help="Seconds that one family may take.")] = 120.0,
    report: Annotated[
        list[str] | None,
        typer.Option("--report", metavar="FILE", help="Write what was found, .json or .md; may stand several times."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the .json report holds already.")] = False,
    as_json: Json = False,
) -> None:
    """Try what a family can do in a hybrid: identity, backward, decoding, generate, padding, checkpointing, pruning.

    A tiny random model is made of the family's defaults, or of a folder's config, and mixed with a tiny GPT-NeoX. The
    verdict is supported, limited or unsupported (exit code 3 for one that was named), with the reasons.
    """
    from mixwright.backbones.family import family_of
    from mixwright.backbones.hf import causal_families
    from mixwright.methods.manticore.families import as_record, probe_apart, read_report, write_report

    if every == bool(names):
        raise ValueError("name families or models' folders, or ask for --all; expected one of the two.")
    for name in names or ():
        family_of(name)
    wanted = list(causal_families()) if every else names or []
    paths = [_writable(path) for path in report or ()]
    found = [one for path in paths if resume and path.endswith(".json") for one in read_report(path)]
    before = len(found)
    for one in probe_apart([name for name in wanted if name not in {known.family for known in found}], limit):
        found.append(one)
        if not as_json and len(wanted) > 1:
            print(f"{len(found)} {one.family}: {one.verdict}", flush=True)
        for path in paths:  # each time: what is found stays, whatever ends the run
            write_report(path, found)
    if as_json:
        print_json(as_record(found))
    elif len(wanted) == 1 and found[before:]:
        _print(found[-1])
    else:
        _print_counts(found)
    refused = not every and any(one.verdict == "unsupported" for one in found[before:])
    raise typer.Exit(REFUSED if refused else 0)


def _writable(path: str) -> str:
    if not path.endswith((".json", ".md")):
        raise ValueError(f"--report {path}: expected a file that ends in .json or .md.")
    return path


def _print(report: "FamilyReport") -> None:
    rows = [(check, "yes" if reason is None else "no", reason or "") for check, reason in report.checks.items()]
    if rows:
        print_table(("check", "holds", "why not"), rows)
    print(f"{report.family}: {report.verdict}" + (f": {report.reason}" if not rows else ""))


def _print_counts(reports: "list[FamilyReport]") -> None:
    rows = [(r.family, r.verdict, r.reason or "") for r in reports if r.verdict != "supported"]
    print_table(("family", "verdict", "why"), rows)
    verdicts = [report.verdict for report in reports]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("supported", "limited", "unsupported"))
    print(f"{len(reports)} families: {counts}")
