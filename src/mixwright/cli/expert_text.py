"""What `experts` learns from text: how good an expert is (`measure`), and where it is at home (`sign`)."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mixwright.cli.output import Json, print_json, print_table

Folder = Annotated[Path, typer.Argument(metavar="CATALOG", help="Folder of the catalogue.")]
Expert = Annotated[str, typer.Argument(metavar="EXPERT", help="Id of an expert in it.")]
Backbone = Annotated[str, typer.Option("--backbone", help="Folder or hub id of the backbone.")]
Text = Annotated[Path, typer.Option("--text", help="JSONL, a text file, or a folder with a test split.")]
General = Annotated[Path | None, typer.Option("--general", help="General text, on which it should do no harm.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Examples of each text at most.")]


def measure(
    catalog: Folder, expert: Expert, backbone: Backbone, text: Text, general: General = None, limit: Limit = 256,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure an expert on text of its task that it has not seen, and write the result on its card.

    Gain over the backbone and harm on general text come in nats per token with 95 % intervals; gates are looked over
    for dead sites; updates and gates are compared with the other experts'.
    """
    from mixwright.api import measure as run

    quality = run(catalog, expert, backbone=backbone, held_out=text, general=general, limit=limit)
    if as_json:
        print_json({"expert": expert, "quality": quality})
        return
    print_table(("measured", "value", "95 %"), _rows(quality), title=f"{expert}: {quality['verdict']['status']}")
    for reason in quality["verdict"]["reasons"]:
        typer.echo(f"  {reason}")


def sign(
    catalog: Folder, expert: Expert, backbone: Backbone, text: Text, limit: Limit = 256, as_json: Json = False
) -> None:
    """Give an expert a signature: statistics of the backbone's activations on text of the expert's own kind.

    No gradient step is made and no text is kept. Adapters that came without gates can be routed by signatures.
    """
    from mixwright.api import sign as run

    sites = run(catalog, expert, backbone=backbone, text=text, limit=limit)
    if as_json:
        print_json({"expert": expert, "signed_sites": sites})
    else:
        typer.echo(f"{expert} has a signature at {sites} sites.")


def _rows(quality: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, what in (("gain", "gain over the backbone"), ("harm", "harm on general text")):
        if name in quality:
            found = quality[name]
            rows.append((what, f"{found['value']:+.3f} nats", f"{found['low']:+.3f} .. {found['high']:+.3f}"))
    if "gate" in quality:
        rows.append(("gate norm, mean over sites", f"{quality['gate']['norm']:.3f}", ""))
        rows.append(("dead gates", str(len(quality["gate"]["dead"])), ""))
    nearest = quality["redundancy"].get("nearest")
    if nearest:
        rows.append(
            (
                f"cosine to the nearest expert, {nearest}",
                f"{quality['redundancy']['experts'][nearest]['update']:.3f}",
                "",
            )
        )
    return rows
