"""ListOps (Nangia and Bowman 2018): nested operations on digits, and the one digit that they come to.

An expression is `[MAX 2 9 [MIN 4 7 ] 0 ]`. MAX and MIN are what they say, SM is the sum modulo 10, MED the median,
between two middle digits the mean of them rounded down. The proportions are those of Long Range Arena, without its
brackets for a binary parser, which it strips: an operation has 2 to `max_arguments` arguments, of which one in four is
an operation again down to `max_depth`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixwright.data.collate import IGNORED, Batch

PAD, ANSWER, CLOSE = 0, 1, 16
_FIRST_DIGIT, _FIRST_OPERATION = 2, 12
OPERATIONS: tuple[str, ...] = ("[MAX", "[MIN", "[MED", "[SM")
SYMBOLS: Mapping[str, int] = {
    **{str(digit): _FIRST_DIGIT + digit for digit in range(10)},
    **{operation: _FIRST_OPERATION + at for at, operation in enumerate(OPERATIONS)},
    "]": CLOSE,
}
"""What is written for a token id. 0 is padding, 1 asks for the answer."""
VOCAB_SIZE = 17
_NESTED = 0.25
_TRIES = 20_000


@dataclass(frozen=True, slots=True)
class ListOps:
    """Expressions of `min_length` to `max_length` tokens, the sign that asks for the answer not counted."""

    min_length: int = 16
    max_length: int = 128
    max_depth: int = 5
    max_arguments: int = 5

    def __post_init__(self) -> None:
        sizes = (self.max_length - self.min_length, self.min_length - 4, self.max_depth - 1, self.max_arguments - 2)
        if min(sizes) < 0 or self.max_length > 512:
            raise ValueError(
                f"ListOps of {self.min_length} to {self.max_length} tokens, depth {self.max_depth}, "
                f"{self.max_arguments} arguments; expected 4 to 512 tokens, depth 1 or more, 2 arguments or more."
            )

    def sample(self, count: int, seed: int) -> Batch:
        """`count` expressions, each ended by ANSWER, where its digit is the only target; padded on the right.

        Raises ValueError when expressions of these lengths do not come about.
        """
        random = np.random.default_rng(seed)
        found = [self._expression(random) for _ in range(count)]
        width = 1 + max(len(tokens) for tokens, _ in found)
        ids, targets = torch.full((count, width), PAD), torch.full((count, width), IGNORED)
        for row, (tokens, value) in enumerate(found):
            ids[row, : len(tokens) + 1] = torch.tensor([*tokens, ANSWER])
            targets[row, len(tokens)] = _FIRST_DIGIT + value
        return Batch("causal", {"input_ids": ids, "attention_mask": (ids != PAD).long()}, targets, count)

    def _expression(self, random: np.random.Generator) -> tuple[list[int], int]:
        for _ in range(_TRIES):
            tokens: list[int] = []
            value = self._operation(tokens, 1, random)
            if value is not None and self.min_length <= len(tokens):
                return tokens, value
        raise ValueError(
            f"no expression of {self.min_length} to {self.max_length} tokens in {_TRIES} tries at depth "
            f"{self.max_depth} with {self.max_arguments} arguments; allow deeper or wider ones, or shorter."
        )

    def _operation(self, tokens: list[int], depth: int, random: np.random.Generator) -> int | None:
        """Write an operation behind `tokens`; its value, or None as soon as there are too many tokens."""
        operation = int(random.integers(len(OPERATIONS)))
        tokens.append(_FIRST_OPERATION + operation)
        arguments: list[int] = []
        for _ in range(int(random.integers(2, self.max_arguments + 1))):
            if depth < self.max_depth and random.random() < _NESTED:
                value = self._operation(tokens, depth + 1, random)
            else:
                value = int(random.integers(10))
                tokens.append(_FIRST_DIGIT + value)
            if value is None or len(tokens) >= self.max_length:  # its bracket is still to come
                return None
            arguments.append(value)
        tokens.append(CLOSE)
        return apply(OPERATIONS[operation], arguments)


def apply(operation: str, arguments: Sequence[int]) -> int:
    """The digit that an operation of these arguments comes to."""
    if operation == "[SM":
        return sum(arguments) % 10
    if operation == "[MED":
        ordered, half = sorted(arguments), len(arguments) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) // 2
    return max(arguments) if operation == "[MAX" else min(arguments)


def written(ids: Tensor) -> str:
    """The expression of a row of token ids, without padding and sign."""
    names = {token: text for text, token in SYMBOLS.items()}
    return " ".join(names[int(token)] for token in ids if int(token) in names)
