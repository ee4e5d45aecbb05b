"""A text in a model that retrieves single neurons, in a terminal: layers and heads, busiest neurons, the least sure."""

from typing import TYPE_CHECKING

from mixwright.evaluation.neuron_text import NeuronText
from mixwright.report.markup import visible
from mixwright.report.neuron_page import coverage_of, unsure_share
from mixwright.report.neuron_tokens import coverage_at, number

if TYPE_CHECKING:
    from rich.console import Console

_NEURONS, _UNSURE = 5, 5


def print_neuron_text(explained: NeuronText, console: "Console") -> None:
    """Print to a rich console. Names and tokens are shown as they are written, never as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(_summary(explained), style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer and head", "neurons", "coverage", "margin", "unsure"):
        table.add_column(name, justify="left" if name == "layer and head" else "right", overflow="fold")
    for site in explained.sites:
        table.add_row(Text(visible(site.site), style="bold"), f"{site.used} of {site.grid[0] * site.grid[1]:,}")
        for place, head in enumerate(site.heads):
            covered = "-" if head.coverage is None else f"{100 * head.coverage:.2g}%"
            unsure = "-" if head.unsure is None else f"{100 * head.unsure:.2g}%"
            table.add_row(f"  head {place}", f"{head.used}", covered, number(head.margin), unsure)
    console.print(table)
    for site in explained.sites:
        console.print(Text(f"Neurons that moved {visible(site.site)} most", style="bold"))
        for neuron in site.busiest[:_NEURONS]:
            fires = ", ".join(repr(visible(explained.tokens[at].text)) for at in neuron.tokens[:4])
            said = f"  {neuron.id} {neuron.place}: {neuron.count} times, {100 * neuron.share:.2g}% of all; {fires}"
            console.print(Text(said))
    covered = [(value, token) for token in explained.tokens if (value := coverage_at(token)) is not None]
    if covered:
        worst = sorted(covered, key=lambda pair: pair[0])[:_UNSURE]
        shown = ", ".join(f"{visible(token.text)!r} {100 * value:.2g}%" for value, token in worst)
        console.print(Text(f"Least sure: {shown}"))


def _summary(explained: NeuronText) -> str:
    covered, unsure, loss = coverage_of(explained), unsure_share(explained), explained.mean_loss()
    said = f"{len(explained.tokens)} tokens, {len(explained.sites)} layers of neurons"
    said += "" if loss is None else f", {loss:.2f} nats per token"
    said += "" if covered is None else f", coverage {100 * covered:.2g}%"
    return said + ("" if unsure is None else f", {100 * unsure:.2g}% of heads unsure")
