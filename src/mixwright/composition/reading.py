"""Raw items as a model's backbone reads them, by what lies beside it: texts, pictures, paths of pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixwright.backbones.hf import load_tokenizer
from mixwright.backbones.image_settings import (
    image_channels,
    image_side,
    load_image_settings,
    own_settings,
    reads_images,
)
from mixwright.composition.support import Read
from mixwright.data.images import picture, pixels_for
from mixwright.data.texts import TextReader

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel


def reader_of(model: "ComposedModel", items: Sequence[Any]) -> Read:
    """What reads such items: a text is the path of a picture where the backbone reads images and there is such a file.

    Raises TypeError where nothing beside the backbone does.
    """
    wants_images = reads_images(model.backbone) is True
    read = _pictures(model) if wants_images and _shows(items[0]) else None
    if not wants_images and isinstance(items[0], str):
        read = _texts(model)
    if read is None and wants_images and isinstance(items[0], str):
        raise TypeError(f"{items[0][:200]!r}: there is no such file; the backbone reads pictures, and texts are paths.")
    if read is None:
        raise TypeError(
            f"items of {type(items[0]).__name__}: nothing beside the backbone reads them; give tensors, or set "
            "model.reader to a function that makes a batch of them."
        )
    return read


def _texts(model: "ComposedModel") -> Read | None:
    path = model.composition.backbone.get("path")
    if model.tokenizer is None and path:
        model.tokenizer = load_tokenizer(path, revision=model.composition.backbone.get("revision"))
    return None if model.tokenizer is None else TextReader(model.tokenizer)


def _pictures(model: "ComposedModel") -> Read:
    path = model.composition.backbone.get("path")
    settings = load_image_settings(path, revision=model.composition.backbone.get("revision")) if path else None
    settings = settings or own_settings(model.backbone)
    size = None if settings else image_side(model.backbone)
    pixels = pixels_for(settings, size=size, channels=image_channels(model.backbone))
    side = max(pixels.size, pixels.resize or 0)
    return lambda items: pixels([picture(item, side) for item in items])


def _shows(item: Any) -> bool:
    """Whether it is a picture, or a path to one."""
    if isinstance(item, str):
        return len(item) < 4096 and "\0" not in item and Path(item).is_file()
    return isinstance(item, Path) or type(item).__module__.split(".")[0] == "PIL"
