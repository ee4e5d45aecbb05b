"""Episodes where the training loop has batches: each is a batch of its own, and its number says which it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast, overload

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import made
from mixwright.data.episodes import Episode, EpisodeSource
from mixwright.data.order import Order


def episode_batches(source: EpisodeSource, *, length: int, digest: str = "") -> Batches:
    """The endless episodes of a source, one after another; `length` stands for how many make one pass."""
    return _batches(_Drawn(source.episode, length), digest, {})


def held_out_batches(sources: Mapping[str, EpisodeSource], each: int, digest: str = "") -> Batches:
    """The first `each` episodes of every source, which are tasks by name: losses are told apart by them."""
    named = list(sources.values())
    drawn = _Drawn(lambda index: named[index // each].episode(index % each), each * len(named))
    return _batches(drawn, digest, dict.fromkeys(sources, each))


def support_batches(domains: Mapping[str, Domain], digest: str = "") -> Batches:
    """Each domain as one episode that is all support: see `support_episode`."""
    named = list(domains.values())
    return _batches(_Drawn(lambda index: support_episode(named[index]), len(named)), digest, dict.fromkeys(domains, 1))


def support_episode(domain: Domain) -> Episode:
    """The episode whose support is the whole domain; its queries are the same items, to be learned from."""
    rows = [(label, of_class) for label, of_class in enumerate(domain.rows) if of_class]
    return made(domain, 0, rows, rows, None)


def _batches(drawn: "_Drawn", digest: str, tasks: Mapping[str, int]) -> Batches:
    order = cast(Order, _InTurn(len(drawn)))
    return Batches(drawn, _the_one, batch_size=1, seed=0, digest=digest, order=order, tasks=tasks)


def _the_one(rows: Sequence[Any]) -> Batch:
    """An episode goes where a batch goes: both move to a device, have a weight, and say where they are from."""
    (episode,) = rows
    return cast(Batch, episode)


class _InTurn:
    """Episode number n comes at place n."""

    def __init__(self, size: int) -> None:
        self.size = size

    def at(self, position: int) -> int:
        return position


class _Drawn(Sequence[Episode]):
    """Episodes by number, each drawn when it is asked for."""

    def __init__(self, draw: Callable[[int], Episode], length: int) -> None:
        self._draw = draw
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | Sequence[Episode]:
        if isinstance(index, slice):
            return [self._draw(number) for number in range(*index.indices(self._length))]
        return self._draw(index)
