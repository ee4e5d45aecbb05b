"""The six tasks of MAD, mechanistic architecture design (Poli et al. 2024): what a sequence mixer can and cannot do.

Everything follows from (task, seed, split); each split is a stream of its own, and who asks for more examples gets the
same ones first. Only what can be known is scored, in training as in testing, so that their losses have one floor: a
value whose key was shown before, a token to be copied, a value that the fixed map gives, a token to be decoded.
Everything else has the target -100, noise above all. A target stands where the logits do: the target at t is what a
causal model should say after token t.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mixwright.data.collate import IGNORED, Batch

Split = Literal["train", "validation", "test"]
_STREAMS: Mapping[str, int] = {"train": 0, "validation": 1, "test": 2}
_BLOCK = 64
_Array = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class MadExamples:
    """`tokens` and `targets` (examples, seq). `last_state`: all targets are to be decoded from the last state."""

    tokens: Tensor
    targets: Tensor
    last_state: bool = False

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, rows: slice) -> "MadExamples":
        return MadExamples(self.tokens[rows], self.targets[rows], self.last_state)

    def to(self, device: torch.device | str) -> "MadExamples":
        """The same examples on another device."""
        return MadExamples(self.tokens.to(device), self.targets.to(device), self.last_state)

    def causal(self) -> Batch:
        """A batch for a causal model. Raises ValueError for compression, which asks more than the next token."""
        if self.last_state:
            raise ValueError(
                "compression is decoded from the last state by a decoder of its own, not token by token; "
                "take tokens and targets, or another task."
            )
        inputs = {"input_ids": self.tokens, "attention_mask": torch.ones_like(self.tokens)}
        return Batch("causal", inputs, self.targets, int((self.targets != IGNORED).sum()))


class MadTask(Protocol):
    """A task with its settings. Token ids run from 0 to `vocab_size` - 1."""

    @property
    def name(self) -> str:
        """Which of the six."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        ...

    @property
    def num_train(self) -> int:
        """Examples of the training set."""
        ...

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples; the same for the same seed and split, and those of a smaller count come first."""
        ...


@dataclass(frozen=True, slots=True)
class InContextRecall:
    """Pairs of a key and its value; after a key that was shown before, its value is asked for.

    Keys are the lower half of the ids that are left beside `noise_tokens`, values the upper half. Every sequence has
    its own map. A share `noise` of the pairs (in expectation) is two noise tokens instead: noisy recall. The last pair
    is always one that was shown before.
    """

    vocab_size: int = 16
    length: int = 128
    noise_tokens: int = 0
    noise: float = 0.0
    num_train: int = 12_800

    def __post_init__(self) -> None:
        _at_least(self, "length", self.length, 4)
        _at_least(self, "vocab_size", self.vocab_size - self.noise_tokens, 4)
        if self.length % 2 or not 0.0 <= self.noise < 1.0 or (self.noise > 0.0 and self.noise_tokens < 1):
            raise ValueError(
                f"{self.name}: length {self.length}, noise {self.noise} of {self.noise_tokens} tokens; expected an "
                "even length, a share of noise from 0 to below 1, and noise tokens where it is above 0."
            )

    @property
    def name(self) -> str:
        """Recall, plain or noisy."""
        return "noisy-recall" if self.noise > 0.0 else "in-context-recall"

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples."""
        return _stream(self._block, count, seed, split)

    def _block(self, random: np.random.Generator, split: Split) -> MadExamples:
        count = _BLOCK
        pairs = self.length // 2
        known = self.vocab_size - self.noise_tokens
        num_keys = known // 2
        keys = random.integers(0, num_keys, (count, pairs))
        value_of = random.integers(num_keys, known, (count, num_keys))
        noisy = random.random((count, pairs)) < self.noise
        shown = random.integers(0, pairs - 1, count)  # a pair that is no noise, for the last to repeat
        rows = np.arange(count)
        noisy[rows, shown] = noisy[:, -1] = False
        chosen = np.where(noisy[:, :-1], -1.0, random.random((count, pairs - 1))).argmax(1)
        keys[:, -1] = keys[rows, chosen]
        values = np.take_along_axis(value_of, keys, 1)
        again = _seen_before(np.where(noisy, -1 - np.arange(pairs), keys))
        drawn = random.integers(known, self.vocab_size, (count, pairs, 2)) if self.noise_tokens else 0
        tokens = np.where(noisy[..., None], drawn, np.stack([keys, values], -1))
        targets = np.stack([np.where(again & ~noisy, values, IGNORED), np.full_like(values, IGNORED)], -1)
        return _examples(tokens.reshape(count, -1), targets.reshape(count, -1))


@dataclass(frozen=True, slots=True)
class FuzzyRecall:
    """In-context recall with keys and values of 1 to `motif` different tokens; in testing, keys of exactly `motif`.

    All tokens of a value are asked for when its key was shown before. Sequences are padded on the left by the last id.
    The last pair is always one that was shown before.
    """

    vocab_size: int = 16
    length: int = 128
    motif: int = 3
    num_train: int = 12_800

    def __post_init__(self) -> None:
        _at_least(self, "length", self.length, 4 * self.motif)
        _at_least(self, "vocab_size", self.vocab_size, 2 * self.motif + 1)

    @property
    def name(self) -> str:
        """Fuzzy recall."""
        return "fuzzy-recall"

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples."""
        return _stream(self._block, count, seed, split)

    def _block(self, random: np.random.Generator, split: Split) -> MadExamples:
        count = _BLOCK
        motif, known = self.motif, self.vocab_size - 1
        slots, half = self.length // 2, known // 2
        key_sizes = np.full((count, slots), motif)
        if split == "train":
            key_sizes = random.integers(1, motif + 1, (count, slots))
        keys = _motifs(random, half, 0, key_sizes, motif)
        first = _first_like(_codes(keys, self.vocab_size))
        values = _motifs(random, known - half, half, random.integers(1, motif + 1, (count, slots)), motif)
        values = np.take_along_axis(values, first[..., None], 1)  # one value for a key, that of its first slot
        pairs = np.concatenate([keys, values], -1)  # (count, slots, 2 motif), -1 where a motif is shorter
        fitting = (pairs >= 0).sum(-1).cumsum(1) <= self.length - 2 * motif
        last = (random.random(count) * fitting.sum(1)).astype(np.int64)
        pairs[~fitting] = -1
        probe = np.take_along_axis(pairs, last[:, None, None], 1)
        pairs = np.concatenate([pairs, probe], 1)
        again = np.concatenate([first < np.arange(slots), np.ones((count, 1), dtype=bool)], 1)
        asked = np.zeros(pairs.shape, dtype=bool)
        asked[..., motif:] = again[..., None]
        tokens, scored = pairs.reshape(count, -1), asked.reshape(count, -1) & (pairs.reshape(count, -1) >= 0)
        to_the_right = np.argsort(tokens >= 0, axis=1, kind="stable")[:, -self.length :]
        tokens, scored = np.take_along_axis(tokens, to_the_right, 1), np.take_along_axis(scored, to_the_right, 1)
        targets = np.full_like(tokens, IGNORED)
        targets[:, :-1] = np.where(scored[:, 1:], tokens[:, 1:], IGNORED)
        return _examples(np.where(tokens < 0, known, tokens), targets)


@dataclass(frozen=True, slots=True)
class SelectiveCopy:
    """`copied` tokens stand in order among blanks; after a sign for it they are to be said, in that order.

    The last id is the sign, the one before it the blank, which also stands where the answer is given.
    """

    vocab_size: int = 16
    length: int = 256
    copied: int = 16
    num_train: int = 12_800

    def __post_init__(self) -> None:
        _at_least(self, "vocab_size", self.vocab_size, 3)
        _at_least(self, "copied", self.copied, 1)
        _at_least(self, "length", self.length, 2 * self.copied + 1)

    @property
    def name(self) -> str:
        """Selective copying."""
        return "selective-copy"

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples."""
        return _stream(self._block, count, seed, split)

    def _block(self, random: np.random.Generator, split: Split) -> MadExamples:
        count = _BLOCK
        body = self.length - self.copied - 1
        symbols = random.integers(0, self.vocab_size - 2, (count, self.copied))
        places = np.sort(random.random((count, body)).argsort(1)[:, : self.copied], 1)
        tokens = np.full((count, self.length), self.vocab_size - 2)
        np.put_along_axis(tokens, places, symbols, 1)
        tokens[:, body] = self.vocab_size - 1
        targets = np.full_like(tokens, IGNORED)
        targets[:, -self.copied :] = symbols
        return _examples(tokens, targets)


@dataclass(frozen=True, slots=True)
class Memorisation:
    """Keys, each followed by the sign that its value goes here: a fixed map, to be kept in the weights.

    The map follows from `map_seed` alone: all seeds and splits share it. No two keys have one value.
    """

    vocab_size: int = 256
    length: int = 32
    map_seed: int = 0
    num_train: int = 256

    def __post_init__(self) -> None:
        _at_least(self, "vocab_size", self.vocab_size, 3)
        _at_least(self, "length", self.length, 2)
        if self.length % 2:
            raise ValueError(f"{self.name}: length {self.length}; expected an even number, a key and a sign by turns.")

    @property
    def name(self) -> str:
        """Memorisation."""
        return "memorisation"

    def value_of(self) -> Tensor:
        """(keys,): the value of each key."""
        num_keys = (self.vocab_size - 1) // 2
        values = num_keys + np.random.default_rng(self.map_seed).permutation(self.vocab_size - 1 - num_keys)
        return torch.from_numpy(values[:num_keys])

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples."""
        return _stream(self._block, count, seed, split)

    def _block(self, random: np.random.Generator, split: Split) -> MadExamples:
        count = _BLOCK
        value_of = self.value_of().numpy()
        keys = random.integers(0, len(value_of), (count, self.length // 2))
        tokens = np.stack([keys, np.full_like(keys, self.vocab_size - 1)], -1)
        targets = np.stack([np.full_like(keys, IGNORED), value_of[keys]], -1)
        return _examples(tokens.reshape(count, -1), targets.reshape(count, -1))


@dataclass(frozen=True, slots=True)
class Compression:
    """Random tokens and a sign at the end, in whose state all of them are kept: token t is to be decoded at place t.

    A share `noise` of the tokens (in expectation) is drawn from `noise_tokens` ids of their own and not asked for.
    """

    vocab_size: int = 16
    length: int = 32
    noise_tokens: int = 0
    noise: float = 0.0
    num_train: int = 12_800

    def __post_init__(self) -> None:
        _at_least(self, "length", self.length, 2)
        _at_least(self, "vocab_size", self.vocab_size - self.noise_tokens, 2)
        if not 0.0 <= self.noise < 1.0 or (self.noise > 0.0 and self.noise_tokens < 1):
            raise ValueError(
                f"{self.name}: noise {self.noise} of {self.noise_tokens} tokens; expected a share below 1."
            )

    @property
    def name(self) -> str:
        """Compression."""
        return "compression"

    def sample(self, count: int, seed: int, split: Split = "train") -> MadExamples:
        """`count` examples."""
        return _stream(self._block, count, seed, split)

    def _block(self, random: np.random.Generator, split: Split) -> MadExamples:
        count = _BLOCK
        known = self.vocab_size - 1 - self.noise_tokens
        symbols = random.integers(0, known, (count, self.length))
        noisy = random.random((count, self.length)) < self.noise
        drawn = random.integers(known, self.vocab_size - 1, (count, self.length)) if self.noise_tokens else 0
        tokens, targets = np.where(noisy, drawn, symbols), np.where(noisy, IGNORED, symbols)
        tokens[:, -1], targets[:, -1] = self.vocab_size - 1, IGNORED
        return _examples(tokens, targets, last_state=True)


def _examples(tokens: _Array, targets: _Array, *, last_state: bool = False) -> MadExamples:
    return MadExamples(torch.from_numpy(tokens), torch.from_numpy(targets), last_state)


def _stream(
    block: Callable[[np.random.Generator, Split], MadExamples], count: int, seed: int, split: Split
) -> MadExamples:
    """The first `count` examples of blocks that are drawn one after another, each from numbers of its own."""
    if split not in _STREAMS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(_STREAMS)}.")
    numbers = range(max(1, -(-count // _BLOCK)))
    drawn = [block(np.random.default_rng([seed, _STREAMS[split], number]), split) for number in numbers]
    return MadExamples(
        torch.cat([each.tokens for each in drawn])[:count],
        torch.cat([each.targets for each in drawn])[:count],
        drawn[0].last_state,
    )


def _first_like(codes: _Array) -> _Array:
    """For each slot of a row, the first slot with the same code."""
    return (codes[:, :, None] == codes[:, None, :]).argmax(-1)


def _seen_before(codes: _Array) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return _first_like(codes) < np.arange(codes.shape[1])


def _motifs(random: np.random.Generator, num_symbols: int, start: int, sizes: _Array, motif: int) -> _Array:
    """(rows, slots, motif): `sizes` different symbols each, then -1."""
    drawn = start + random.random((*sizes.shape, num_symbols)).argsort(-1)[..., :motif]
    return np.where(np.arange(motif) < sizes[..., None], drawn, -1)


def _codes(motifs: _Array, vocab_size: int) -> _Array:
    return ((motifs + 1) * (vocab_size + 1) ** np.arange(motifs.shape[-1])).sum(-1)


def _at_least(task: MadTask, setting: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{task.name}: {setting} {value}; expected {least} or more.")
