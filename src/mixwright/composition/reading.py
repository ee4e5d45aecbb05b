"""Raw items as a model's backbone reads them, by what lies beside it: its tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixwright.backbones.hf import load_tokenizer
from mixwright.composition.support import Read
from mixwright.data.texts import TextReader

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel


def reader_of(model: "ComposedModel", items: Sequence[Any]) -> Read:
    """What reads such items. Raises TypeError where nothing beside the backbone does."""
    path = model.composition.backbone.get("path")
    if isinstance(items[0], str):
        if model.tokenizer is None and path:
            model.tokenizer = load_tokenizer(path, revision=model.composition.backbone.get("revision"))
        if model.tokenizer is not None:
            return TextReader(model.tokenizer)
    raise TypeError(
        f"items of {type(items[0]).__name__}: nothing beside the backbone reads them; give tensors, or set "
        "model.reader to a function that makes a batch of them."
    )
