"""A found hybrid in a terminal: the verdict, the weights as bars, what each is worth, and what was not measured."""

from typing import TYPE_CHECKING

from mixwright.evaluation.hybrid import HybridExplanation
from mixwright.report.hybrid_words import (
    flatness_sentences,
    left_out_sentences,
    reasons,
    row_name,
    signed,
    slot_name,
    sweep_sentence,
    verdict_sentences,
)
from mixwright.report.markup import visible

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 12
_MARKS = {"needs": "+", "hurts": "!", "even": "="}


def print_hybrid(found: HybridExplanation, console: "Console") -> None:
    """Print to a rich console. Names are shown as they are written, never as markup."""
    from rich.text import Text

    first, *others = verdict_sentences(found)
    console.print(Text(visible(first), style="bold"))
    for text in others:
        console.print(Text(visible(text)))
    console.print()
    _weights(found, console)
    _systems(found, console)
    said = [f"{_MARKS[kind]} {text}" for kind, text in reasons(found)]
    said += [f"  {text}" for text in left_out_sentences(found)]
    for text in said:
        console.print(Text(visible(text)))
    places = {row.name: row_name(row) for row in found.rows}
    ground = [sweep_sentence(one, places[one.row]) for one in found.sweeps]
    ground += flatness_sentences(found.flatness) if found.flatness is not None else []
    if ground:
        console.print()
    for text in ground:
        console.print(Text(visible(text)))
    if found.missing:
        console.print(Text("\nNot measured", style="bold"))
    for text in found.missing:
        console.print(Text(f"- {visible(text)}", style="dim"))


def _weights(found: HybridExplanation, console: "Console") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    of = {slot: row for row in found.rows for slot in row.slots}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("place")
    for component in found.components:
        table.add_column(Text(visible(component.name)), overflow="fold")
    for place, slot in enumerate(found.slots):
        cells = [Text(slot_name(slot))]
        for m, component in enumerate(found.components):
            weight = of[slot].weights[m]
            bar = "\u2588" * round(_BAR * weight)
            layers = component.layers[place] if place < len(component.layers) else ""
            cells.append(Text(f"{bar:<{_BAR}} {weight:.2f} {layers}".rstrip()))
        table.add_row(*cells)
    console.print(table)


def _systems(found: HybridExplanation, console: "Console") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not found.systems:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("system", "nats per token", "hybrid minus it", "95 %", "the hybrid is"):
        table.add_column(name, justify="left" if name in ("system", "the hybrid is") else "right", overflow="fold")
    for one in found.systems:
        gap = None if one.against is None else one.against.difference
        spread = "" if gap is None else f"{signed(gap.low)} to {signed(gap.high)}"
        shown = ("", "", "") if gap is None or one.against is None else (signed(gap.value), spread, one.against.word)
        table.add_row(Text(visible(one.system)), f"{one.loss:.3f}", *shown)
    console.print(table)
