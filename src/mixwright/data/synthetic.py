"""Synthetic tasks that need no download: substitution ciphers over small alphabets, three exams for routers.

A backbone that copies its input knows no cipher; an expert learns some. In `exclusive` every expert knows the cipher of
its own alphabet only, so experts exclude each other. `mixing` has the same experts, but one input draws on several
alphabets, in blocks or interleaved. In `overlapping` every expert knows three ciphers, shared with its neighbours, and
the test wears a template that no expert has seen.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from mixwright.data.collate import IGNORED, Batch

PAD, END, ANSWER = 0, 1, 2
_RESERVED = 3


@dataclass(frozen=True, slots=True)
class Language:
    """The symbols, and the one cipher of each alphabet. Everything follows from `seed`.

    Ids: 0 pad (and T5's start), 1 end, 2 answer, then `templates` template tokens, then `alphabets` times `symbols`.
    """

    alphabets: int = 8
    symbols: int = 8
    templates: int = 16
    length: int = 8
    seed: int = 0

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.first_symbol + self.alphabets * self.symbols

    @property
    def first_symbol(self) -> int:
        """Id of the first symbol of the first alphabet."""
        return _RESERVED + self.templates

    def cipher(self) -> Int[Tensor, " vocab"]:
        """Symbol -> its substitute within its own alphabet, never itself; every other id stays."""
        generator = Generator().manual_seed(self.seed)
        table = torch.arange(self.vocab_size)
        for alphabet in range(self.alphabets):
            start = self.first_symbol + alphabet * self.symbols
            order = start + torch.randperm(self.symbols, generator=generator)
            table[order] = order.roll(1)  # one cycle through the alphabet: nothing is left where it was
        return table


@dataclass(frozen=True, slots=True)
class Examples:
    """Token ids: `source` (examples, source_length) and `target` (examples, target_length), which ends with END."""

    source: Int[Tensor, "examples source_length"]
    target: Int[Tensor, "examples target_length"]

    def __len__(self) -> int:
        return self.source.shape[0]

    def __getitem__(self, rows: slice) -> "Examples":
        return Examples(self.source[rows], self.target[rows])

    def seq2seq(self) -> Batch:
        """A batch for an encoder-decoder."""
        inputs = {"input_ids": self.source, "attention_mask": torch.ones_like(self.source)}
        return Batch("seq2seq", inputs, self.target, self.target.numel())

    def causal(self) -> Batch:
        """A batch for a decoder: source, ANSWER, target in one row, of which the target counts."""
        answer = self.source.new_full((len(self), 1), ANSWER)
        ids = torch.cat([self.source, answer, self.target[:, :-1]], 1)
        targets = torch.cat([torch.full_like(self.source, IGNORED), self.target], 1)
        return Batch("causal", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, self.target.numel())


@dataclass(frozen=True, slots=True)
class CipherTask:
    """Inputs of `alphabets` under a `template`, to be enciphered (or copied).

    Each row draws `mix` distinct alphabets from `alphabets`; they take turns symbol by symbol if `interleaved`, else
    one block each. `mix=0` draws an alphabet afresh for every symbol. `template`: the two leading tokens, or None for
    two at random.
    """

    name: str
    alphabets: tuple[int, ...]
    mix: int = 1
    interleaved: bool = False
    template: tuple[int, int] | None = None
    copied: bool = False

    def sample(self, language: Language, count: int, seed: int) -> Examples:
        """`count` examples; the same for the same seed."""
        generator = Generator().manual_seed(seed)
        choice = self._alphabet_of_each_symbol(language.length, count, generator)
        symbol = torch.randint(language.symbols, choice.shape, generator=generator)
        body = language.first_symbol + choice * language.symbols + symbol
        prefix = _RESERVED + torch.randint(language.templates, (count, 2), generator=generator)
        if self.template is not None:
            prefix = _RESERVED + torch.tensor(self.template).expand(count, 2)
        answer = body if self.copied else language.cipher()[body]
        end = torch.full((count, 1), END)
        return Examples(torch.cat([prefix, body], 1), torch.cat([answer, end], 1))

    def _alphabet_of_each_symbol(self, length: int, count: int, generator: Generator) -> Int[Tensor, "count length"]:
        pool = torch.tensor(self.alphabets)
        if self.mix == 0:
            return pool[torch.randint(len(pool), (count, length), generator=generator)]
        drawn = pool[torch.rand(count, len(pool), generator=generator).argsort(-1)[:, : self.mix]]
        position = torch.arange(length)
        turn = position % self.mix if self.interleaved else position * self.mix // length
        return drawn[:, turn]


@dataclass(frozen=True, slots=True)
class Suite:
    """One exam: what each expert is trained on, and what the composed model is tested on."""

    name: str
    experts: tuple[CipherTask, ...]
    tests: tuple[CipherTask, ...]


def copying(language: Language) -> CipherTask:
    """What the backbone learns: to copy symbols of all alphabets, whatever the template."""
    return CipherTask("copy", tuple(range(language.alphabets)), mix=0, copied=True)


def exclusive(language: Language) -> Suite:
    """Each expert knows one cipher and the test needs exactly one expert."""
    experts = tuple(CipherTask(f"cipher{a}", (a,)) for a in range(language.alphabets))
    return Suite("exclusive", experts, experts)


def mixing(language: Language) -> Suite:
    """The experts of `exclusive`; the test draws on two or four of them within one input."""
    everyone = tuple(range(language.alphabets))
    tests = (
        CipherTask("block2", everyone, mix=2),
        CipherTask("inter2", everyone, mix=2, interleaved=True),
        CipherTask("block4", everyone, mix=4),
        CipherTask("inter4", everyone, mix=4, interleaved=True),
    )
    return Suite("mixing", exclusive(language).experts, tests)


def overlapping(language: Language) -> Suite:
    """Expert z knows ciphers z, z+1, z+2 under its own template; a test needs two neighbours, under an unseen one."""
    count = language.alphabets
    if language.templates < 2 * count:
        raise ValueError(f"{count} experts and as many tests need {2 * count} templates, not {language.templates}.")
    experts = tuple(
        CipherTask(f"skills{z}", tuple((z + i) % count for i in range(3)), mix=0, template=(z, z)) for z in range(count)
    )
    tests = tuple(
        CipherTask(f"unseen{z}", (z, (z + 1) % count), mix=0, template=(count + z, count + z)) for z in range(count)
    )
    return Suite("overlapping", experts, tests)


def suites(language: Language) -> tuple[Suite, ...]:
    """All three."""
    return exclusive(language), mixing(language), overlapping(language)
