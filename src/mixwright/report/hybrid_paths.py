"""How the mixture weights of a hybrid moved in training: one chart for each place, a band where there were seeds."""

from collections.abc import Mapping, Sequence

from mixwright.evaluation.hybrid_trajectories import Trajectory, still
from mixwright.report.hybrid_words import slot_name
from mixwright.report.lines import Line, line_chart
from mixwright.report.markup import escape, table, tag


def paths_section(found: Sequence[Trajectory], styles: Mapping[str, str], short: Mapping[str, str]) -> str:
    """A row of charts for each stage; what stood still, or moved as another place did, is said and not drawn."""
    if not found:
        note = "Not told: no runs were given. `mixwright explain FOLDER --runs RUN` draws them from a run\u2019s log."
        return tag(
            "section", tag("h2", "How the weights came about"), tag("p", escape(note), class_="note"), id="paths"
        )
    stages = list(dict.fromkeys(one.stage for one in found))
    parts = [_stage(stage, [one for one in found if one.stage == stage], styles, short) for stage in stages]
    many = max(one.runs for one in found)
    band = (
        f"A line is the mean of {many} runs, the band their smallest and largest." if many > 1 else "One run: no band."
    )
    return tag(
        "section",
        tag("h2", "How the weights came about"),
        tag("p", f"Mixture weight, 0 to 1, by training step. {band}", class_="note"),
        *parts,
        id="paths",
    )


def _stage(stage: str, found: Sequence[Trajectory], styles: Mapping[str, str], short: Mapping[str, str]) -> str:
    slots = list(dict.fromkeys(one.slot for one in found))
    moving = [slot for slot in slots if not all(still(one) for one in found if one.slot == slot)]
    quiet = [slot_name(slot) for slot in slots if slot not in moving]
    figures = [_figure(slot, [one for one in found if one.slot == slot], styles, short) for slot in moving]
    said = f"Did not move: {', '.join(quiet)}." if quiet else ""
    return "".join(
        (
            tag("h3", "Stage ", tag("bdi", escape(stage))),
            tag("div", *figures, class_="curves-grid") if figures else "",
            tag("p", escape(said), class_="note") if said else "",
            _numbers(found),
        )
    )


def _figure(slot: str, found: Sequence[Trajectory], styles: Mapping[str, str], short: Mapping[str, str]) -> str:
    dashed = {component: f"{style} dash{place % 3}" for place, (component, style) in enumerate(styles.items())}
    lines = [
        Line(one.component, one.steps, one.mean, dashed[one.component], short[one.component], one.low, one.high)
        for one in found
    ]
    title = f"{slot_name(slot)}: " + ", ".join(
        f"{one.component} from {one.mean[0]:.2f} to {one.mean[-1]:.2f}" for one in found
    )
    drawn = line_chart(lines, title, x_name="step", y_range=(0.0, 1.0))
    return tag("figure", tag("figcaption", escape(slot_name(slot))), drawn)


def _numbers(found: Sequence[Trajectory]) -> str:
    rows = [
        tag(
            "tr",
            tag("th", escape(slot_name(one.slot)), scope="row"),
            tag("td", tag("bdi", escape(one.component))),
            tag("td", f"{one.mean[0]:.3f}"),
            tag("td", f"{one.mean[-1]:.3f}"),
            tag("td", f"{one.low[-1]:.3f} to {one.high[-1]:.3f}" if one.runs > 1 else "-"),
            tag("td", f"{one.runs}"),
        )
        for one in found
    ]
    head = ("Place", "Component", "First", "Last", "Last, over runs", "Runs")
    return tag("details", tag("summary", "As numbers"), table(head, rows))
