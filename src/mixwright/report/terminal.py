"""The explanation in a terminal: the text in its experts' colours, a bar of experts, and what one of them is worth."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mixwright.evaluation.explain import Explanation
from mixwright.report.markup import visible
from mixwright.report.palette import Look, looks
from mixwright.report.prominence import LISTED, by_prominence
from mixwright.report.text_view import runs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_INK = "#17181a"
_BAR = 32


def print_explanation(explanation: Explanation, console: "Console") -> None:
    """Print to a rich console. Where it has no colour, each run of tokens is marked by its expert's label instead."""
    from rich.text import Text

    order = by_prominence(explanation)
    drawn = looks(explanation.experts, order)
    plain = console.no_color or console.color_system is None
    for stream in dict.fromkeys(token.stream for token in explanation.tokens):
        if stream != "text":
            console.print(Text({"source": "Input", "target": "Answer"}.get(stream, stream), style="bold"))
        console.print(_text(explanation, stream, drawn, plain=plain), soft_wrap=False)
        console.print()
    if not order:
        console.print(Text("No expert acted on this text."))
    for expert in order[:LISTED]:
        console.print(_row(explanation, expert, drawn[expert], order, plain=plain))
    if len(order) > LISTED:
        console.print(Text(f"and {len(order) - LISTED} more experts", style="dim"))
    console.print()
    for line in worth(explanation):
        console.print(Text(line))


def worth(explanation: Explanation) -> list[str]:
    """What the experts, and the one that was left out, are worth on this text, in sentences."""
    loss, backbone, without = (explanation.mean_loss(s) for s in ("loss", "loss_backbone", "loss_without"))
    lines: list[str] = []
    if loss is not None and backbone is not None:
        lines.append(f"{loss:.2f} nats per token, against {backbone:.2f} of the backbone alone")
    if loss is not None and without is not None:
        cost = round(without - loss, 2) + 0.0  # no -0.00
        lines.append(f"without {visible(str(explanation.without))}, this passage costs {cost:+.2f} nats per token")
    return lines


def _text(explanation: Explanation, stream: str, drawn: Mapping[str, Look], *, plain: bool) -> "Text":
    from rich.text import Text

    text = Text()
    for leader, piece in runs([token for token in explanation.tokens if token.stream == stream]):
        shown = visible(piece).expandtabs(4)
        if leader is None:
            text.append(shown)
        elif plain:
            text.append(f"[{drawn[leader].label}]{shown}")
        else:
            text.append(shown, style=f"{_INK} on {drawn[leader].colour[1]}")
    return text.append(visible(explanation.tails.get(stream, "")))


def _row(explanation: Explanation, expert: str, look: Look, order: list[str], *, plain: bool) -> "Text":
    """Label, name, a bar as long as the tokens that it leads, and its numbers."""
    from rich.text import Text

    led = explanation.led(expert)
    most = max(explanation.led(other) for other in order)
    length = round(_BAR * led / most) if most else 0
    width = min(24, max(len(visible(other)) for other in order))
    row = Text()
    row.append(f" {look.label} ", style="" if plain else f"bold {_INK} on {look.colour[1]}")
    row.append(f" {visible(expert)[:width]:<{width}} ", style="")
    row.append("█" * length + " " * (_BAR - length), style="" if plain else look.colour[1])
    place = explanation.experts.index(expert)
    added = [values[place] for values in explanation.contribution_by_depth]
    weight = [values[place] for values in explanation.weight_by_depth]
    row.append(f" {led:>4} tokens  weight {_mean(weight):.2f}  adds {100 * _mean(added):.1f}%", style="")
    row.no_wrap, row.overflow = True, "ellipsis"
    return row


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
