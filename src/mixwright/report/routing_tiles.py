"""Who uses which latent expert, layer by layer: weights beside what the experts really add."""

from collections.abc import Sequence
from dataclasses import dataclass

from mixwright.evaluation.linkage import Merge, cut
from mixwright.evaluation.task_routing import LayerParts, TaskRouting, TaskTable
from mixwright.report.heat import Panel, heat, rulers
from mixwright.report.markup import escape, tag
from mixwright.report.palette import labels

FOLDED = 24
"""More tasks, or more layers, than this are shown in groups, and one by one behind a fold."""
_SQUARES, _TITLES, _FEWEST = 100_000, 2_000, 8


@dataclass(frozen=True)
class Rows:
    """Who has a row of their own: tasks, or where they are many groups of the most similar ones."""

    labels: list[str]
    names: list[str]
    members: list[list[int]]
    merges: list[Merge]

    @property
    def grouped(self) -> bool:
        """Whether a row may stand for several tasks."""
        return any(len(group) > 1 for group in self.members)


def rows_of(routing: TaskRouting) -> Rows:
    """Rows in the tree's order; as few as it takes to keep the page small."""
    count, most = len(routing.tasks), FOLDED
    drawn = sum(len(routing.routers[layer.router].positions) + len(layer.share[0]) for layer in routing.layers)
    if drawn * len(routing.experts) * most > _SQUARES:
        most = max(_FEWEST, _SQUARES // (drawn * len(routing.experts)))
    members, merges = cut(routing.merges, count, count if count <= most else most)
    short = labels(routing.tasks)
    if all(len(group) == 1 for group in members):
        names = [routing.tasks[group[0]] for group in members]
        return Rows([short[name] for name in names], names, members, merges)
    return Rows(
        [f"g{number}" for number, _ in enumerate(members, start=1)],
        [_group(routing, group) for group in members],
        members,
        merges,
    )


def _group(routing: TaskRouting, group: Sequence[int]) -> str:
    first = routing.tasks[group[0]]
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"


def tiles_section(routing: TaskRouting, rows: Rows) -> str:
    """Every layer as a figure; many layers are folded by depth."""
    depths: dict[str, list[LayerParts]] = {}
    for layer in routing.layers:
        depths.setdefault(layer.depth, []).append(layer)
    said = len(rows.names) * len(routing.layers) <= _TITLES
    folded = len(routing.layers) > FOLDED
    drawn = "".join(
        _depth(routing, rows, depth, layers, said=said, folded=folded, first=place == 0)
        for place, (depth, layers) in enumerate(depths.items())
    )
    shared = [table for table in routing.routers if len(table.sites) > 1]
    return tag(
        "section",
        tag("h2", "Routing, layer by layer"),
        tag(
            "p",
            "A row is a task"
            + (" or a group of similar ones" if rows.grouped else "")
            + ", a column a latent expert. The "
            "area of a square is the routing weight; beside it, what the expert adds: its exact share of the task's "
            "update. An expert can have the say and do little with it, or work against the others.",
            class_="note",
        ),
        _swatches(),
        rulers(rows.labels, len(routing.experts)),
        "".join(_shared(routing, rows, table) for table in shared),
        drawn,
        id="layers",
    )


def _swatches() -> str:
    said = (("o", "more than an even part"), ("u", "less"), ("m", "against the others"))
    return tag("p", *(tag("span", tag("i", class_=kind), text) for kind, text in said), class_="swatches")


def _shared(routing: TaskRouting, rows: Rows, table: TaskTable) -> str:
    """A router that several layers follow is drawn once."""
    where = f"one router for {len(table.sites)} layers"
    caption = tag("figcaption", escape(where), tag("small", tag("bdi", escape(_span(table.sites)))))
    return tag("div", tag("figure", caption, _panels(_weights(routing, rows, table, said=True))), class_="tiles")


def _span(sites: Sequence[str]) -> str:
    return f"{sites[0]} to {sites[-1]}"


def _depth(
    routing: TaskRouting, rows: Rows, depth: str, layers: Sequence[LayerParts], *, said: bool, folded: bool, first: bool
) -> str:
    figures = tag("div", *(_figure(routing, rows, layer, said=said) for layer in layers), class_="tiles")
    if not folded:
        return tag("h3", escape(depth)) + figures
    count = f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"
    head = tag("summary", escape(depth), " ", tag("small", count))
    return tag("details", head, figures, open=True if first else None, class_="deep")


def _figure(routing: TaskRouting, rows: Rows, layer: LayerParts, *, said: bool) -> str:
    table = routing.routers[layer.router]
    own = _weights(routing, rows, table, said=said) if len(table.sites) == 1 else []
    name = layer.site.removeprefix(layer.depth).lstrip(".") or layer.site
    caption = tag("figcaption", tag("bdi", escape(name)), tag("small", _said(layer, table)))
    return tag("figure", caption, _panels([*own, *_shares(routing, rows, layer, said=said)]))


def _said(layer: LayerParts, table: TaskTable) -> str:
    words = [] if layer.change is None else [f"moves {100 * _mean(layer.change):.2g}% of the layer"]
    if table.usage is not None and table.peakiness is not None:
        words += [f"usage {table.usage:.2f}", f"peakiness {table.peakiness:.2f}"]
    return escape(", ".join(words))


def _panels(panels: Sequence[Panel]) -> str:
    drawn = (tag("div", tag("p", escape(panel.caption)), heat(panel)) for panel in panels)
    return tag("div", *drawn, class_="panels")


def _weights(routing: TaskRouting, rows: Rows, table: TaskTable, *, said: bool) -> list[Panel]:
    return [
        _panel(routing, rows, [task[place] for task in table.weights], f"weight {position}".strip(), said=said)
        for place, position in enumerate(table.positions)
    ]


def _shares(routing: TaskRouting, rows: Rows, layer: LayerParts, *, said: bool) -> list[Panel]:
    orders = len(layer.share[0])
    return [
        _panel(
            routing,
            rows,
            [task[order] for task in layer.share],
            f"adds, order {order + 1}" if orders > 1 else "adds",
            said=said,
        )
        for order in range(orders)
    ]


def _panel(routing: TaskRouting, rows: Rows, values: Sequence[Sequence[float]], caption: str, *, said: bool) -> Panel:
    means = [[_mean(column) for column in zip(*(values[task] for task in group))] for group in rows.members]
    titles = [f"{name}, {caption}: {' '.join(f'{v:.2f}' for v in row)}" for name, row in zip(rows.names, means)]
    return Panel(caption, means, 1.001 / len(routing.experts), titles if said else ())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
