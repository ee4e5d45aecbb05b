"""One self-contained page of a pool of sparse experts: what it changes, who overlaps, what one task makes of it."""

from collections.abc import Sequence
from importlib.resources import files

from mixwright.evaluation.pool import OUTSIDE, Pool, PoolCell
from mixwright.evaluation.pool_episode import PoolEpisode, best_strength
from mixwright.report.heat import Panel, heat, rulers
from mixwright.report.markup import document, escape, table, tag
from mixwright.report.pool_words import episode_sentences, glossary, percent, pool_sentences, without_sentence
from mixwright.report.provenance import provenance
from mixwright.report.tree import tree

_TITLE = "What this pool of experts changes, and why"


def pool_page(pool: Pool, episodes: Sequence[PoolEpisode] = ()) -> str:
    """The page as one string of HTML: no script, no file beside it, nothing from the network."""
    body = [
        tag("a", "Skip to the pattern", href="#pattern", class_="skip"),
        tag("header", *_headline(pool, episodes), class_="page"),
        tag(
            "main",
            *(_episode_section(episode, folded=place > 0) for place, episode in enumerate(episodes)),
            _pattern_section(pool),
            _overlap_section(pool),
            _tasks_section(pool),
            _tensors_section(pool),
            _glossary(pool),
            provenance(pool.composition),
            class_="page",
        ),
    ]
    sheets = (
        files("mixwright.report").joinpath(name).read_text("utf-8") for name in ("task_page.css", "pool_page.css")
    )
    return document(_TITLE, body, "".join(sheets))


def _headline(pool: Pool, episodes: Sequence[PoolEpisode]) -> list[str]:
    first, *others = pool_sentences(pool)
    for episode in episodes[:1]:
        others += episode_sentences(episode)
    facts = [
        ("experts", f"{len(pool.experts)}"),
        ("weights that may change", f"{pool.weights:,}"),
        ("changed by an expert", percent(sum(pool.density) / len(pool.density))),
        ("touched by any", percent(pool.union)),
        ("of these masks, neither 0 nor 1", percent(sum(pool.fractional) / len(pool.fractional))),
    ][: None if pool.masked else 2]
    return [
        tag("p", "mixwright explain", class_="kicker"),
        tag("h1", _TITLE),
        tag("p", escape(first), class_="lede"),
        *(tag("p", tag("bdi", escape(text)), class_="lede") for text in others),
        tag("dl", *(tag("div", tag("dt", escape(k)), tag("dd", escape(v))) for k, v in facts), class_="facts"),
    ]


def _pattern_section(pool: Pool) -> str:
    places, kinds = _axes(pool.cells)
    at = {(cell.place, cell.kind): cell for cell in pool.cells}
    most = max((value for cell in pool.cells for value in cell.density), default=0.0) or 1.0
    panels: list[str] = []
    for m, expert in enumerate(pool.experts):
        rows = [[_share(at.get((place, kind)), m) / most for kind in kinds] for place in places]
        titles = [
            f"{place}: " + ", ".join(f"{k} {percent(_share(at[place, k], m))}" for k in kinds if (place, k) in at)
            for place in places
        ]
        caption = f"{expert}: {percent(pool.density[m])}"
        drawn = heat(Panel(caption, rows, pool.density[m] / most, titles))
        panels.append(tag("div", tag("p", tag("bdi", escape(caption))), drawn))
    note = (
        "A row for each depth, a column for each kind of weights, a panel for each expert. The area of a square is the "
        f"share of those weights that the expert changes; a full one is {percent(most)}. Strong: more than the expert "
        "changes on the whole; soft: less. Point at a row for its numbers."
    )
    legend = tag("ol", *(tag("li", tag("bdi", escape(kind))) for kind in kinds), class_="kinds", start="0")
    labels = ["-" if place == OUTSIDE else place[-4:] for place in places]
    return tag(
        "section",
        tag("h2", "Where each expert acts"),
        tag("p", escape(note), class_="note"),
        legend,
        rulers(labels, len(kinds)),
        tag("div", *panels, class_="panels"),
        id="pattern",
    )


def _axes(cells: Sequence[PoolCell]) -> tuple[list[str], list[str]]:
    """Depths and kinds as rows and columns; kinds that lie in the layers stand before those outside."""
    places = list(dict.fromkeys(cell.place for cell in cells))
    inside = dict.fromkeys(cell.kind for cell in cells if cell.place != OUTSIDE)
    return places, list(inside | dict.fromkeys(cell.kind for cell in cells))


def _share(cell: PoolCell | None, expert: int) -> float:
    return 0.0 if cell is None else cell.density[expert]


def _overlap_section(pool: Pool) -> str:
    count = len(pool.experts)
    if count < 2 or not pool.masked:
        return ""
    lines: list[str] = []
    for i, expert in enumerate(pool.experts):
        cells = [
            tag("td", "-", class_="self")
            if i == j
            else tag(
                "td",
                f"{pool.overlap[i][j]:.2f} {tag('small', f'{pool.chance[i][j]:.2f}')}",
                class_="over" if pool.overlap[i][j] > 2 * pool.chance[i][j] else None,
            )
            for j in range(count)
        ]
        lines.append(tag("tr", tag("th", tag("bdi", escape(expert)), scope="row"), *cells))
    note = (
        "Of the weights that either of two experts changes, the share that both do; small beside it what chance would "
        "give, p / (2 - p) for two masks of density p. Over twice chance is set strong: such experts are much alike."
    )
    return tag(
        "section",
        tag("h2", "How alike the experts are"),
        tag("p", note, class_="note"),
        table(("", *pool.experts), lines),
    )


def _tasks_section(pool: Pool) -> str:
    tasks, title = pool.tasks, tag("h2", "Tasks by their mixture")
    if len(tasks.names) < 2:
        note = "It takes two tasks to compare: give --support more than once, or let the model remember adaptations."
        return tag("section", title, tag("p", note, class_="note"), id="tasks")
    note = (
        "Tasks whose mixtures are alike stand together; two branches meet at the share of the mixture that differs "
        "between them (average linkage)."
    )
    ends = ("0%, the same mixture", percent(max((merge.height for merge in tasks.merges), default=0.0)))
    names = [tag("bdi", escape(name), title=name) for name in tasks.names]
    drawn = tree(tasks.merges, names, tasks.order, "Tree of tasks by mixture", ends)
    lines = [
        tag("tr", tag("th", names[task], scope="row"), *(tag("td", percent(w)) for w in tasks.weights[task]))
        for task in tasks.order
    ]
    return tag(
        "section", title, tag("p", note, class_="note"), drawn, table(("Task", *pool.experts), lines), id="tasks"
    )


def _tensors_section(pool: Pool) -> str:
    lines = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(one.name)), scope="row"),
            tag("td", _meter(one.change / max(pool.tensors[0].change, 1e-12)), f"{100 * one.change:.3g}%"),
            tag("td", percent(one.moved)),
        )
        for one in pool.tensors
    ]
    note = (
        f"The {len(pool.tensors)} parameters that move most, relative to their own length, under the mixture of "
        f"{pool.mixture}; those that were pretrained at zero are left out."
    )
    head = ("Parameter", "Change: length of the change / length of the weights", "Weights that move")
    return tag(
        "section", tag("h2", "What moves most"), tag("p", tag("bdi", escape(note)), class_="note"), table(head, lines)
    )


def _meter(share: float) -> str:
    return tag("span", tag("i", style=f"width:{100 * min(1.0, share):.1f}%"), class_="meter")


def _episode_section(episode: PoolEpisode, folded: bool) -> str:
    whole = dict(episode.dial)[1.0]
    order = sorted(episode.experts, key=lambda one: -one.weight)
    experts = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(one.name)), scope="row"),
            tag("td", _meter(one.weight), f"{percent(one.weight)} \u00b1 {percent(one.spread)}"),
            tag("td", f"{one.norm:.3g}"),
            tag("td", escape(without_sentence(whole, one.without))),
        )
        for one in order
    ]
    best = best_strength(episode)
    dial = [
        tag("tr", tag("th", f"{strength:g}", scope="row"), *cells, class_="best" if strength == best else None)
        for strength, measured in episode.dial
        if measured is not None
        for cells in [
            [
                tag("td", percent(measured.accuracy)),
                tag("td", f"{measured.loss:.3f}"),
                tag("td", f"{measured.ece:.3f}"),
            ]
        ]
    ]
    moving = [
        tag(
            "tr",
            tag("th", tag("bdi", escape(one.name)), scope="row"),
            tag("td", tag("bdi", escape(one.label))),
            tag("td", percent(one.moves)),
        )
        for one in episode.moving
    ]
    said = [tag("p", tag("bdi", escape(text)), class_="note") for text in episode_sentences(episode)]
    title = tag("h2", "One task: ", tag("bdi", escape(episode.name)))
    parts = said if folded else []
    parts += [tag("h3", "What was chosen, and what leaving an expert out does")]
    parts += [table(("Expert", "Share, and its spread", "Moves the weights by", "Without it"), experts)]
    if dial:
        parts += [tag("h3", f"The strength dial, measured on {escape(episode.measured_on)}")]
        parts += [table(("Strength", "Right", "Loss", "Calibration error"), dial)]
    if moving:
        parts += [tag("h3", "Examples that move the choice most, when left out")]
        parts += [table(("Example", "Class", "Of the mixture changes"), moving)]
    if folded:
        parts = [tag("details", tag("summary", "The figures of this task"), *parts)]
    return tag("section", title, *parts)


def _glossary(pool: Pool) -> str:
    words = (tag("div", tag("dt", escape(word)), tag("dd", escape(meaning))) for word, meaning in glossary(pool))
    return tag("section", tag("h2", "Words"), tag("dl", *words, class_="glossary"), id="words")
