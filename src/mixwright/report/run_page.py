"""One self-contained page of an evaluation: scores with intervals, how the routers behaved, what it cost.

It reads what `mixwright eval --json` writes: an object whose `scores` are rows of `system`, `task`, `metric`, `value`
and, where they were measured, `low`, `high`, `n` and `seed`; `metric` is the decisive one, and `means` are its rows
over all tasks, with `minus_backbone` where it was measured. Whatever else is there is shown as tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mixwright.evaluation.scores import LOWER_IS_BETTER
from mixwright.evaluation.table import BEST_SINGLE, ORACLE
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.palette import looks, palette_rules
from mixwright.report.provenance import provenance
from mixwright.report.svg import Dot, dots

_REFERENCES = (BEST_SINGLE, ORACLE)
_KNOWN = ("records", "scores", "means", "composition", "metric", "metrics", "systems", "tasks")


@dataclass(frozen=True)
class Score:
    """One value with its interval, of one system on one task, or (`task` empty) on all; `gap` to the backbone."""

    system: str
    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    gap: str = ""


def run_page(results: Mapping[str, Any]) -> str:
    """The page as one string of HTML. Raises ValueError for results without records, or with rows that lack a key."""
    scores = _scores(results.get("scores") or results.get("records"))
    metrics = list(dict.fromkeys([str(results.get("metric") or scores[0].metric), *(s.metric for s in scores)]))
    means = _means(scores, results.get("means"), metrics[0])
    body = [
        tag("header", *_headline(means, metrics, scores), class_="page"),
        tag(
            "main",
            *(_metric(metric, scores, means) for metric in metrics),
            *(_rest(key, value) for key, value in results.items() if key not in _KNOWN and value),
            provenance(results["composition"]) if results.get("composition") else "",
            class_="page",
        ),
    ]
    return document("Evaluation", body, palette_rules({"x0": looks(["best"])["best"]}))


def _scores(rows: Any) -> list[Score]:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError("the results have no scores; expected what `mixwright eval ... --json` writes.")
    return [_score(row, number) for number, row in enumerate(cast(Sequence[Any], rows))]


def _score(row: Any, number: int) -> Score:
    try:
        low, high = (None if row.get(end) is None else float(row[end]) for end in ("low", "high"))
        task, n = str(row.get("task") or ""), row.get("n")
        gap = row.get("minus_backbone")
        said = f"{gap['value']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" if gap else ""
        return Score(str(row["system"]), task, str(row["metric"]), float(row["value"]), low, high, n, said)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        wanted = "system, task, metric, value"
        raise ValueError(f"score {number} can't be read ({error!r}); each needs {wanted}.") from None


def _means(scores: Sequence[Score], given: Any, decisive: str) -> list[Score]:
    """Each system over all tasks: as it was measured, or else the plain mean of its tasks, without an interval."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.metric, score.system), []).append(score)
    measured = [_score({"task": "", "metric": decisive, **row}, number) for number, row in enumerate(given or ())]
    known = {(score.metric, score.system) for score in measured}
    return measured + [_pooled(group, task="") for key, group in groups.items() if key not in known]


def _pooled(group: Sequence[Score], task: str) -> Score:
    if len(group) == 1:
        only = group[0]
        return Score(only.system, task, only.metric, only.value, only.low, only.high, only.n)
    value = sum(score.value for score in group) / len(group)
    return Score(group[0].system, task, group[0].metric, value)


def _headline(means: Sequence[Score], metrics: Sequence[str], scores: Sequence[Score]) -> list[str]:
    ranked = [score for score in _ranked(means, metrics[0]) if score.system not in _REFERENCES]
    systems = len({score.system for score in scores} - set(_REFERENCES))
    tasks = len({score.task for score in scores})
    best = tag("strong", tag("bdi", escape(ranked[0].system)))
    where = f"on {tasks} task{'' if tasks == 1 else 's'}"
    said = f" is first of {systems} systems {where}: {escape(metrics[0])} {ranked[0].value:.3f}"
    gap = ""
    if len(ranked) > 1:
        margin = abs(ranked[0].value - ranked[1].value)
        gap = f", {margin:.3f} ahead of {escape(ranked[1].system)}"
    return [
        tag("p", "mixwright eval", class_="kicker"),
        tag("h1", "Which system does the work best"),
        tag("p", best, said, gap, ".", _overlap(ranked), class_="lede"),
    ]


def _overlap(ranked: Sequence[Score]) -> str:
    """A caution where the intervals of the first two meet."""
    if len(ranked) < 2 or any(end is None for score in ranked[:2] for end in (score.low, score.high)):
        return ""
    (low, high), (other_low, other_high) = ((score.low, score.high) for score in ranked[:2])
    meet = cast(float, low) <= cast(float, other_high) and cast(float, other_low) <= cast(float, high)
    return " Their intervals overlap." if meet else ""


def _ranked(means: Sequence[Score], metric: str) -> list[Score]:
    """Best first."""
    chosen = [score for score in means if score.metric == metric]
    return sorted(chosen, key=lambda score: score.value, reverse=metric not in LOWER_IS_BETTER)


def _metric(metric: str, scores: Sequence[Score], means: Sequence[Score]) -> str:
    ranked = _ranked(means, metric)
    drawn = dots(
        [Dot(s.system, s.value, s.low, s.high, "x0" if s is ranked[0] else "") for s in ranked], f"{metric} by system"
    )
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    tasks = list(dict.fromkeys(score.task for score in scores if score.metric == metric))
    note = (
        f"Mean over tasks, {better} is better. A bar is the 95 % interval; where bars overlap the order may be chance."
    )
    if any(score.system in _REFERENCES for score in ranked):
        note += (
            f" \u201c{BEST_SINGLE}\u201d and \u201c{ORACLE}\u201d are chosen on these very scores: upper references."
        )
    gaps = any(score.gap for score in ranked)
    lines = [_line(score, tasks, scores, gaps=gaps) for score in ranked]
    return tag(
        "section",
        tag("h2", escape(metric)),
        tag("p", note, class_="note"),
        tag("figure", drawn),
        table(("System", "Mean", "95 %", *(["Minus backbone, paired"] if gaps else []), *tasks), lines),
    )


def _line(mean: Score, tasks: Sequence[str], scores: Sequence[Score], *, gaps: bool) -> str:
    cells = [tag("td", escape(mean.gap))] if gaps else []
    for task in tasks:
        found = [s for s in scores if (s.system, s.metric, s.task) == (mean.system, mean.metric, task)]
        cells.append(tag("td", _cell(_pooled(found, task)) if found else "-"))
    spread = "" if mean.low is None or mean.high is None else f"{mean.low:.3f} to {mean.high:.3f}"
    name = tag("th", tag("bdi", escape(mean.system)), scope="row")
    return tag("tr", name, tag("td", f"{mean.value:.3f}"), tag("td", spread), *cells)


def _cell(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.value:.3f}"
    return f"{score.value:.3f} {tag('small', f'{score.low:.3f} to {score.high:.3f}')}"


def _rest(key: str, value: Any) -> str:
    """Whatever else was written down, as a table: routing statistics, cost, differences."""
    title = escape(key.replace("_", " ").capitalize())
    return tag("section", tag("h2", title), _shown(value))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = cast(Mapping[Any, Any], value)
        if rows and all(isinstance(row, Mapping) for row in rows.values()):
            return _shown([{"": name, **row} for name, row in rows.items()])
        lines = [
            tag("tr", tag("th", tag("bdi", escape(k)), scope="row"), tag("td", _plain(v))) for k, v in rows.items()
        ]
        return table(("", ""), lines)
    if isinstance(value, Sequence) and not isinstance(value, str):
        listed = cast(Sequence[Any], value)
        if listed and all(isinstance(row, Mapping) for row in listed):
            columns = list(dict.fromkeys(str(key) for row in listed for key in row))
            lines = [tag("tr", *(tag("td", _plain(row.get(column))) for column in columns)) for row in listed]
            return table(columns, lines)
        return tag("p", escape(", ".join(map(str, listed))))
    return tag("p", _plain(value))


def _plain(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return escape(", ".join(f"{k} {_plain(v)}" for k, v in cast(Mapping[Any, Any], value).items()))
    return tag("bdi", escape(value))
