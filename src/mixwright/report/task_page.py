"""One self-contained page of a model routed by task: which latent experts serve which task, and what they are worth."""

from collections.abc import Sequence
from importlib.resources import files

from mixwright.evaluation.linkage import cut
from mixwright.evaluation.step_time import StepTimes
from mixwright.evaluation.task_alarms import task_alarms
from mixwright.evaluation.task_routing import LayerParts, TaskRouting, TaskTable
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.palette import labels
from mixwright.report.provenance import provenance
from mixwright.report.routing_tiles import FOLDED, Rows, rows_of, tiles_section
from mixwright.report.tree import tree

_NUMBERS = ("discreteness", "sparsity", "usage", "peakiness", "separation", "agreement")
_MEANING = (
    ("Discreteness", "entropy of the gates: 0 on or off, 1 undecided"),
    ("Sparsity", "share of gates over one half"),
    ("Usage", "1: all latent experts carry the same load"),
    ("Peakiness", "0: uniform rows, 1: one expert for each task"),
    ("Separation", "0: all tasks have the same row"),
    ("Agreement", "correlation, with other layers, of which tasks are alike"),
    ("Change", "length of the update over that of the layer's weight, mean over tasks"),
    ("Overlap", "mean absolute cosine between experts' parts of the update"),
    ("Cancelling", "the parts' squares over the update's: over 1, they work against each other"),
)


def task_page(routing: TaskRouting, times: StepTimes | None = None, command: str = "") -> str:
    """The page as one string of HTML: no script, no file beside it. `command` is what measured `times`."""
    rows = rows_of(routing)
    body = [
        tag("a", "Skip to the layers", href="#layers", class_="skip"),
        tag("header", *_headline(routing), class_="page"),
        tag(
            "main",
            _tasks_section(routing, rows),
            tiles_section(routing, rows),
            _numbers_section(routing),
            _cost_section(routing, times, command),
            provenance(routing.composition),
            class_="page",
        ),
    ]
    style = files("mixwright.report").joinpath("task_page.css").read_text(encoding="utf-8")
    return document("Which latent expert serves which task", body, style)


def _headline(routing: TaskRouting) -> list[str]:
    tasks, experts, layers = len(routing.tasks), len(routing.experts), len(routing.layers)
    facts = [("tasks", f"{tasks:,}"), ("latent experts in a layer", f"{experts}"), ("layers", f"{layers:,}")]
    facts += [
        (name, f"{value:.2f}") for name in ("usage", "peakiness") if (value := mean_of(routing, name)) is not None
    ]
    facts += [("numbers stored", short(routing.cost["stored"] + routing.cost["router"]))]
    facts += [("merged, for one task", short(routing.cost["merged"]))]
    return [
        tag("p", "mixwright explain", class_="kicker"),
        tag("h1", "Which latent expert serves which task"),
        tag("p", *_alike(routing), class_="lede"),
        _alarms(routing),
        tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts"),
    ]


def _alike(routing: TaskRouting) -> list[str]:
    """The nearest pair of tasks, and the one that stands most apart, in a sentence."""
    if len(routing.tasks) < 2:
        return ["One task uses all of it."]
    nearest = next(m for m in routing.merges if m.size == 2)
    pair = [tag("strong", tag("bdi", escape(routing.tasks[one]))) for one in (nearest.left, nearest.right)]
    said = [
        *pair[:1],
        " and ",
        *pair[1:],
        f" are routed most alike: {percent(nearest.height)} of their weight differs",
    ]
    alone, others, height = _apart(routing)
    if len(routing.tasks) > 2 and height > 0:
        subject = tag("strong", tag("bdi", escape(routing.tasks[alone[0]])))
        many = f" and {len(alone) - 1} more stand" if len(alone) > 1 else " stands"
        said += ["; ", subject, f"{many} furthest from the other {others}: {percent(height)}"]
    return [*said, "."]


def _apart(routing: TaskRouting) -> tuple[list[int], int, float]:
    """The smaller side of the tree's last merge, the size of the larger, and how far apart they are."""
    groups, rest = cut(routing.merges, len(routing.tasks), 2)
    smaller, larger = sorted(groups, key=len)
    return smaller, len(larger), rest[-1].height


def percent(share: float) -> str:
    """A share of one as a percentage of two digits."""
    return f"{100 * share:.0f}%" if share >= 0.1 or share < 1e-6 else f"{100 * share:.2g}%"


def short(count: int) -> str:
    """A count of a few characters: 11.1 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,}"


def mean_of(routing: TaskRouting, name: str) -> float | None:
    """One of a table's numbers, the mean over layers."""
    values = [(value, len(one.sites)) for one in routing.routers if (value := getattr(one, name)) is not None]
    return sum(value * count for value, count in values) / sum(count for _, count in values) if values else None


def _alarms(routing: TaskRouting) -> str:
    found = task_alarms(routing)
    if not found:
        return tag(
            "ul", tag("li", tag("b", "No alarm."), "No routing collapsed, no expert is idle."), class_="alarms quiet"
        )
    items = (tag("li", tag("b", escape(f"{alarm.kind.capitalize()}.")), escape(alarm.text)) for alarm in found)
    return tag("ul", *items, class_="alarms")


def _tasks_section(routing: TaskRouting, rows: Rows) -> str:
    if len(routing.tasks) < 2:
        return ""
    groups = f", here in {len(rows.names)} groups of the most similar" if rows.grouped else ""
    note = (
        f"Tasks that use the same latent experts stand together{groups}. Two branches meet at the share of the routing "
        "weight that differs between their tasks, the mean over layers (average linkage)."
    )
    key = [tag("b", escape(label), class_="key") for label in rows.labels]
    names = [mark + tag("bdi", escape(name), title=name) for mark, name in zip(key, rows.names)]
    ends = ("0%, the same routing", percent(max(merge.height for merge in routing.merges)))
    drawn = tree(rows.merges, names, range(len(names)), "Tree of tasks by routing", ends)
    every = ""
    if rows.grouped:
        of = {task: mark for mark, group in zip(key, rows.members) for task in group}
        plain = [of[task] + tag("bdi", escape(name), title=name) for task, name in enumerate(routing.tasks)]
        whole = tree(routing.merges, plain, routing.order, "Tree of all tasks by routing", ends)
        every = tag("details", tag("summary", f"All {len(plain)} tasks"), whole)
    nearest = _nearest(routing)
    listed = (
        nearest if len(routing.tasks) <= FOLDED else tag("details", tag("summary", "Every task's nearest"), nearest)
    )
    return tag("section", tag("h2", "Tasks by their routing"), tag("p", note, class_="note"), drawn, every, listed)


def _nearest(routing: TaskRouting) -> str:
    short_names = labels(routing.tasks)
    moved = [routing.change(task) for task in range(len(routing.tasks))]
    lines: list[str] = []
    for task in routing.order:
        others = [other for other in range(len(routing.tasks)) if other != task]
        near = min(others, key=lambda other: routing.distances[task][other])
        name = routing.tasks[task]
        change = moved[task]
        lines.append(
            tag(
                "tr",
                tag("th", tag("b", escape(short_names[name]), class_="key"), tag("bdi", escape(name)), scope="row"),
                tag("td", "-" if change is None else f"{100 * change:.3g}%"),
                tag("td", tag("bdi", escape(routing.tasks[near]))),
                tag("td", percent(routing.distances[task][near])),
            )
        )
    return table(("Task", "Moves the layers by", "Nearest task", "Differs by"), lines)


def _numbers_section(routing: TaskRouting) -> str:
    every = [_line(layer.site, [layer], [routing.routers[layer.router]]) for layer in routing.layers]
    head = ("Layer", *(name for name, _ in _MEANING))
    meaning = (tag("div", tag("dt", name), tag("dd", text)) for name, text in _MEANING)
    agreed = "" if routing.agreement is None else f"Layers agree by {routing.agreement:.2f} on which tasks are alike."
    if len(routing.layers) > FOLDED:
        depths: dict[str, list[LayerParts]] = {}
        for layer in routing.layers:
            depths.setdefault(layer.depth, []).append(layer)
        means = [_line(d, found, [routing.routers[layer.router] for layer in found]) for d, found in depths.items()]
        fold = tag("details", tag("summary", f"All {len(every)} layers"), table(head, every))
        shown = table(("Depth, means", *head[1:]), means) + fold
    else:
        shown = table(head, every)
    words = tag("dl", *meaning, class_="provenance")
    return tag(
        "section", tag("h2", "Every layer in numbers"), tag("p", agreed, class_="note") if agreed else "", words, shown
    )


def _line(name: str, layers: Sequence[LayerParts], tables: Sequence[TaskTable]) -> str:
    cells = [_mean([v for one in tables if (v := getattr(one, number)) is not None]) for number in _NUMBERS]
    change = _mean([_mean(layer.change) or 0.0 for layer in layers if layer.change is not None])
    numbers = [*cells, None, _mean([overlap(layer) for layer in layers]), _mean([layer.cancelling for layer in layers])]
    shown = ["-" if value is None else f"{value:.2f}" for value in numbers]
    shown[len(cells)] = "-" if change is None else f"{100 * change:.3g}%"
    return tag("tr", tag("th", tag("bdi", escape(name)), scope="row"), *(tag("td", cell) for cell in shown))


def overlap(layer: LayerParts) -> float:
    """Mean absolute cosine between the parts of two different experts."""
    count = len(layer.overlap)
    others = [abs(v) for i, row in enumerate(layer.overlap) for j, v in enumerate(row) if i != j]
    return sum(others) / len(others) if count > 1 else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cost_lines(routing: TaskRouting, times: StepTimes | None, command: str) -> list[tuple[str, str, str]]:
    """What it costs: name, amount, remark."""
    cost, tasks = routing.cost, len(routing.tasks)
    lines = [
        ("Stored, latent experts", f"{cost['stored']:,}", f"{cost['per_latent']:,} for one of {len(routing.experts)}"),
        ("Stored, routers", f"{cost['router']:,}", f"{tasks} tasks"),
        ("Trained, everything", f"{cost['stored'] + cost['router']:,}", "latent experts and routers"),
        ("Trained, routing of one more task", f"{cost['router_per_task']:,}", "experts fixed"),
        ("Merged, one task as a LoRA", f"{cost['merged']:,}", f"rank {cost['merged_rank']}, exact"),
        ("Merged, one task in the weights", "0", "nothing is added to the backbone"),
        (f"A LoRA of that rank for each of {tasks} tasks", f"{cost['merged'] * tasks:,}", "for comparison"),
    ]
    if cost["dead"]:
        lines.append(("Stored and never read", f"{cost['dead']:,}", "leaf entries that only reach what the cut drops"))
    if times is not None:
        threads = f"{times.threads} thread{'' if times.threads == 1 else 's'}"
        size = f"{times.rows} rows of {times.tokens} random tokens, tasks in turn, {threads}, {times.device}"
        lines += [
            ("Milliseconds per training step", f"{times.train:.1f}", f"forward, backward, AdamW; {size}"),
            ("Milliseconds per evaluation pass", f"{times.evaluate:.1f}", f"median of 5; {command}"),
            ("Milliseconds, backbone alone", f"{times.backbone:.1f}", "the same pass without experts"),
        ]
    return lines


def _cost_section(routing: TaskRouting, times: StepTimes | None, command: str) -> str:
    lines = [
        tag("tr", tag("th", escape(name), scope="row"), tag("td", escape(amount)), tag("td", escape(remark)))
        for name, amount, remark in cost_lines(routing, times, command)
    ]
    drawn = tag("div", tag("table", tag("tbody", *lines), class_="cost"), class_="wide", tabindex="0")
    untimed = "" if times else " Times were not measured; --measure takes them."
    note = f"Stored, trained and merged are three different counts of numbers.{untimed}"
    return tag("section", tag("h2", "What it costs"), tag("p", note, class_="note"), drawn)
