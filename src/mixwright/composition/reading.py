"""Raw items as a model's backbone reads them: texts by the tokenizer, pictures by the settings that lie beside it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mixwright.backbones.hf import load_tokenizer
from mixwright.backbones.image_settings import load_image_settings
from mixwright.composition.domain_readers import DomainReaders
from mixwright.data.domains import Domain
from mixwright.data.encoded import Encoded
from mixwright.ops.rows import Inputs

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel


def reader_of(model: "ComposedModel", items: Any) -> Callable[[Any], Inputs]:
    """What reads such items: texts, paths of image files, Pillow's pictures, or images in bytes as one tensor.

    Raises TypeError where nothing beside the backbone does.
    """
    path, revision = model.composition.backbone.get("path"), model.composition.backbone.get("revision")
    first = items[0]
    if isinstance(first, str):
        if model.tokenizer is None and path:
            model.tokenizer = load_tokenizer(path, revision=revision)
        if model.tokenizer is None:
            raise TypeError("items are texts, and no tokenizer is known: set model.tokenizer, or model.reader.")
    elif not isinstance(first, Path | Tensor) and not hasattr(first, "save"):
        raise TypeError(
            f"items of {type(first).__name__}: nothing beside the backbone reads them; give tensors, or set "
            "model.reader to a function that makes a batch of them."
        )
    settings = load_image_settings(path, revision=revision) if path and not isinstance(first, str) else None
    readers = DomainReaders(model.backbone, tokenizer=model.tokenizer, images=settings)

    def read(items: Any) -> Inputs:
        given = items if isinstance(items, Tensor) else [_plain(place, item) for place, item in enumerate(items)]
        return readers.read(Domain("support", given, [0] * len(given), ("items",))).read(range(len(given)))

    return read


def _plain(place: int, item: Any) -> Any:
    """A text as it is, a file as it lies on disk, a picture as its file would be."""
    if isinstance(item, Path):
        return Encoded(str(item), path=item)
    if isinstance(item, str):
        return item
    file = io.BytesIO()
    item.save(file, format="PNG")
    return Encoded(f"picture {place}", data=file.getvalue())
