"""Texts of a domain as a backbone reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Generator, Tensor

from mixwright.data.collate import Tokenizer, inputs_of, padded_inputs


@dataclass(frozen=True)
class TextReader:
    """Token ids and their mask, padded to the longest text of those that are read together; each is tokenised once."""

    tokenizer: Tokenizer
    max_length: int = 512
    _known: dict[str, list[int]] = field(default_factory=dict[str, list[int]], repr=False)

    def __call__(self, items: Sequence[str], generator: Generator | None = None) -> dict[str, Tensor]:
        """These texts as one batch; texts are not augmented."""
        del generator
        fresh = [text for text in dict.fromkeys(items) if text not in self._known]
        if fresh:
            self._known.update(zip(fresh, inputs_of(self.tokenizer, fresh, self.max_length)))
        return padded_inputs(self.tokenizer, [self._known[text] for text in items])
