"""A pool of sparse experts in a terminal: what it changes, by depth and expert, and what one task makes of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixwright.evaluation.pool import Pool
from mixwright.evaluation.pool_episode import PoolEpisode
from mixwright.report.markup import visible
from mixwright.report.pool_words import episode_sentences, percent, pool_sentences, without_sentence

if TYPE_CHECKING:
    from rich.console import Console

_SHADES = " \u2591\u2592\u2593\u2588"


def print_pool(pool: Pool, console: "Console", episodes: Sequence[PoolEpisode] = ()) -> None:
    """Print to a rich console. Names are shown as they are written, never as markup."""
    from rich.text import Text

    first, *others = pool_sentences(pool)
    console.print(Text(visible(first), style="bold"))
    for text in others:
        console.print(Text(visible(text)))
    for episode in episodes:
        console.print()
        _episode(episode, console)
    _pattern(pool, console)
    _table(console, ("moves most", "change", "weights that move"), [
        (one.name, f"{100 * one.change:.3g}%", percent(one.moved)) for one in pool.tensors[:8]
    ])  # fmt: skip
    if len(pool.tasks.names) > 1:
        rows = [(pool.tasks.names[t], *(percent(w) for w in pool.tasks.weights[t])) for t in pool.tasks.order]
        _table(console, ("task", *pool.experts), rows)


def _pattern(pool: Pool, console: "Console") -> None:
    places = list(dict.fromkeys(cell.place for cell in pool.cells))
    rows: list[tuple[str, ...]] = []
    for place in places:
        cells = [cell for cell in pool.cells if cell.place == place]
        weights = sum(cell.weights for cell in cells)
        shares = [sum(c.density[m] * c.weights for c in cells) / max(1, weights) for m in range(len(pool.experts))]
        rows.append((place, f"{weights:,}", *(f"{_shade(share)} {percent(share)}" for share in shares)))
    _table(console, ("depth", "weights", *pool.experts), rows)


def _shade(share: float) -> str:
    return _SHADES[min(len(_SHADES) - 1, round(share * 2 * (len(_SHADES) - 1)))]


def _episode(episode: PoolEpisode, console: "Console") -> None:
    from rich.text import Text

    for text in episode_sentences(episode):
        console.print(Text(visible(text)))
    whole = dict(episode.dial)[1.0]
    order = sorted(episode.experts, key=lambda one: -one.weight)
    rows = [(o.name, percent(o.weight), percent(o.spread), without_sentence(whole, o.without)) for o in order]
    _table(console, ("expert", "share", "spread", "without it"), rows)
    measured = [(f"{s:g}", percent(m.accuracy), f"{m.loss:.3f}", f"{m.ece:.3f}") for s, m in episode.dial if m]
    if measured:
        _table(console, ("strength", "right", "loss", "calibration error"), measured)
    _table(console, ("example", "class", "moves the mixture"), [
        (one.name, one.label, percent(one.moves)) for one in episode.moving[:5]
    ])  # fmt: skip


def _table(console: "Console", head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(head):
        drawn.add_column(Text(visible(name)), justify="left" if at == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(visible(cell)) for cell in row))
    console.print(drawn)
