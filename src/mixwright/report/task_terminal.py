"""A model routed by task in a terminal: the tree of tasks, what is wrong, every layer in numbers, what it costs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixwright.evaluation.linkage import Merge
from mixwright.evaluation.step_time import StepTimes
from mixwright.evaluation.task_alarms import task_alarms
from mixwright.evaluation.task_routing import TaskRouting
from mixwright.report.markup import visible
from mixwright.report.routing_tiles import FOLDED, rows_of
from mixwright.report.task_page import cost_lines, percent

if TYPE_CHECKING:
    from rich.console import Console

_BRANCHES, _NAME = 36, 28


def print_task_routing(
    routing: TaskRouting, console: "Console", times: StepTimes | None = None, command: str = ""
) -> None:
    """Print to a rich console. Names are shown as they are written, never as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tasks, experts, layers = len(routing.tasks), len(routing.experts), len(routing.layers)
    console.print(Text(f"{tasks} tasks, {experts} latent experts in each of {layers} layers\n", style="bold"))
    rows = rows_of(routing)
    for name, branch in zip(rows.names, branches(rows.merges, len(rows.names))):
        shown = visible(name)
        short = shown if len(shown) <= _NAME else f"{shown[: _NAME - 1]}\u2026"
        console.print(Text(f"{short:<{_NAME}} {branch}", no_wrap=True, overflow="crop"))
    if rows.merges:
        furthest = percent(max(merge.height for merge in rows.merges))
        console.print(
            Text(f"{'':<{_NAME}} {'0%':<{_BRANCHES - 1}}{furthest} of the routing weight differs", style="dim")
        )
    console.print()
    for alarm in task_alarms(routing):
        console.print(Text(f"{alarm.kind}: {visible(alarm.text)}", style="bold"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "usage", "peakiness", "separation", "agreement", "change"):
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for layer in routing.layers[:FOLDED]:
        one = routing.routers[layer.router]
        numbers = (one.usage, one.peakiness, one.separation, one.agreement)
        change = "-" if layer.change is None else f"{100 * sum(layer.change) / len(layer.change):.3g}%"
        table.add_row(Text(visible(layer.site)), *("-" if n is None else f"{n:.2f}" for n in numbers), change)
    console.print(table)
    if layers > FOLDED:
        console.print(Text(f"and {layers - FOLDED} more layers; --output or --json shows them all", style="dim"))
    for name, amount, remark in cost_lines(routing, times, command):
        console.print(Text(f"{name}: {amount} ({remark})"))


def branches(merges: Sequence[Merge], count: int) -> list[str]:
    """The tree over things 0 to count - 1, in this order, one line for each of them."""
    grid = [[" "] * (_BRANCHES + count) for _ in range(count)]
    most = max((merge.height for merge in merges), default=0.0)
    tips = {thing: (0, thing) for thing in range(count)}
    for number, merge in enumerate(merges):
        (left, top), (right, bottom) = sorted((tips.pop(merge.left), tips.pop(merge.right)), key=lambda tip: tip[1])
        x = max(round(_BRANCHES * merge.height / most) if most > 0 else 0, left + 1, right + 1)
        for start, row in ((left, top), (right, bottom)):
            grid[row][start:x] = "\u2500" * (x - start)
        for row in range(top + 1, bottom):
            grid[row][x] = "\u2502"
        grid[top][x], grid[bottom][x] = "\u2510", "\u2518"
        middle = (top + bottom) // 2
        if number < len(merges) - 1:
            grid[middle][x] = "\u252c" if middle == top else "\u251c"
        tips[count + number] = (x + 1, middle)
    return ["".join(row).rstrip() for row in grid]
