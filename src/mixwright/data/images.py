"""Image files as pixels: decoded when they are first asked for, kept small and in bytes. Needs the extra `vision`."""

import io
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from mixwright.data.encoded import Encoded
from mixwright.data.pixels import Augmentation, Pixels
from mixwright.errors import MissingExtra

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MOST_PIXELS = 1 << 26
_CACHE_BYTES = 512 << 20
_ROOM = 1.3  # a cached image is larger than what is cut out, so that an enlarged part is not blurred


class ImageReader:
    """Files as `pixels` reads them. An image is decoded once, as long as all of them have room in `cache_bytes`."""

    def __init__(self, pixels: Pixels, cache_bytes: int = _CACHE_BYTES) -> None:
        self.pixels = pixels
        self.cache_bytes = cache_bytes
        self._side = round(max(pixels.size, pixels.resize or 0) * (_ROOM if pixels.augmentation else 1))
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._held = 0

    def __call__(self, items: Sequence[Encoded], generator: Generator | None = None) -> Tensor:
        """These images as one batch. Raises ValueError naming a file that cannot be read."""
        return self.pixels([self._image(item) for item in items], generator)

    def _image(self, item: Encoded) -> Tensor:
        if item.where not in self._cache:
            self._cache[item.where] = image = decode(item, self._side)
            self._held += image.numel()
            while self._held > self.cache_bytes and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].numel()
        self._cache.move_to_end(item.where)
        return self._cache[item.where]


def decode(item: Encoded, side: int | None = None) -> Tensor:
    """An image in bytes, (1 or 3, height, width); its shorter side no longer than `side` where that is given.

    Grey stays grey, what shines through is white, and the camera's note on which way is up is followed. Raises
    ValueError for a damaged or cut-off file, another format than the usual ones, and more than 2^26 pixels;
    MissingExtra without Pillow.
    """
    library = _pillow(item.where)
    data = item.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; what matters is refused
        _refuse_huge(item, data, library)
        try:
            with library.Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                if side is not None:
                    opened.draft(None, (2 * side, 2 * side))  # a JPEG is decoded no larger than it need be
                image = _plain(library.ImageOps.exif_transpose(opened), library)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # decoders raise anything over damaged files
            raise ValueError(f"{item.where}: a damaged image ({error}); repair it or take it out.") from error
    return _bytes(image, side, library)


def picture(item: Any, side: int | None = None) -> Tensor:
    """The same of a path, or of an image that Pillow has opened. Raises TypeError for anything else."""
    if isinstance(item, str | Path):
        return decode(Encoded(str(item), Path(item)), side)
    library = _pillow("a picture")
    if not isinstance(item, library.Image.Image):
        raise TypeError(f"a {type(item).__name__} among pictures; expected paths or images of Pillow.")
    return _bytes(_plain(library.ImageOps.exif_transpose(item), library), side, library)


def pixels_for(
    settings: Mapping[str, Any] | None,
    *,
    size: int | None = None,
    channels: int = 3,
    augmentation: Augmentation | None = None,
) -> Pixels:
    """How a backbone wants its images: by the settings of its `preprocessor_config.json`, at `size` where it is given.

    Without settings -1 to 1. Raises ValueError where neither says the size, or the settings are not to be understood.
    """
    given = settings or {}
    scaled = float(given.get("rescale_factor", 1 / 255)) * 255 if given.get("do_rescale", True) else 255.0
    offset = 1.0 if given.get("rescale_offset") else 0.0
    normalised = given.get("do_normalize", True)
    mean = _channels(given.get("image_mean", 0.5) if normalised else 0.0, channels)
    std = _channels(given.get("image_std", 0.5) if normalised else 1.0, channels)
    short, cut = _sides(given)
    target = size or cut
    if target is None:
        raise ValueError("image_size: missing, and the backbone does not say it; give the side of its images.")
    return Pixels(
        size=target,
        resize=None if short is None or cut is None else max(target, round(target * short / cut)),
        mean=tuple((value + offset) / scaled for value in mean),
        std=tuple(value / scaled for value in std),
        augmentation=augmentation,
    )


def _sides(settings: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """To what the shorter side is brought, and the side of what is cut out of that."""
    short, cut = _side(settings.get("size")), _side(settings.get("crop_size"))
    if short is None or not settings.get("do_resize", True):
        return cut, cut
    if settings.get("do_center_crop") and cut is not None:
        return short, cut
    share = settings.get("crop_pct")
    return (short if share is None or short >= 384 else round(short / share)), short


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        sides: set[Any] = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key) is not None}
        if len(sides) > 1:
            raise ValueError(f"image_size: the backbone reads images of {dict(size)}; only squares are made.")
        size = next(iter(sides), None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"image_size: the backbone's preprocessor_config.json says {size!r}; expected a whole number.")
    return size


def _channels(values: Any, channels: int) -> list[float]:
    listed = [float(value) for value in values] if isinstance(values, list | tuple) else [float(values)]
    if len(listed) == 1:
        return listed * channels
    if len(listed) != channels:
        raise ValueError(f"preprocessor_config.json has {len(listed)} means and the backbone {channels} channels.")
    return listed


def _refuse_huge(item: Encoded, data: bytes, library: Any) -> None:
    try:
        with library.Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            width, height = opened.size
    except library.Image.DecompressionBombError:
        width = height = _MOST_PIXELS
    except Exception as error:
        accepted = ", ".join(_FORMATS)
        raise ValueError(f"{item.where}: not an image that can be read ({accepted}); take it out.") from error
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{item.where}: more pixels than the {_MOST_PIXELS} that are decoded; shrink it.")


def _plain(image: Any, library: Any) -> Any:
    """The picture in eight bits, grey or colours, on white."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layers = image.convert("RGBA")
        ground = library.Image.new("RGBA", layers.size, "white")
        return library.Image.alpha_composite(ground, layers).convert("RGB")
    if image.mode.startswith("I"):  # sixteen bits of grey
        return library.Image.fromarray((np.array(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are fractions; write whole numbers")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _bytes(image: Any, side: int | None, library: Any) -> Tensor:
    shrunk = 1.0 if side is None else side / min(image.size)
    if shrunk < 1:
        target = [max(1, round(length * shrunk)) for length in image.size]
        image = image.resize(target, library.Image.Resampling.BICUBIC)
    values = np.array(image, dtype=np.uint8)
    return torch.from_numpy(values).reshape(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def _pillow(where: str) -> Any:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("vision", f"reading {where}") from None
    return _Pillow(Image, ImageOps)


class _Pillow:
    """The two modules that are used of it."""

    def __init__(self, image: Any, image_ops: Any) -> None:
        self.Image = image
        self.ImageOps = image_ops
