"""Images held as bytes, as a backbone reads them: cut to one size, augmented where wanted, normalised."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training items are varied: a random crop brought to size, mirrored, and its colours moved.

    `crop`: smallest share of the area that is kept. `flip`: mirrored half of the time, which is wrong for writing.
    `jitter`: largest relative change of brightness, contrast and saturation.
    """

    crop: float = 0.35
    flip: bool = True
    jitter: float = 0.4


PHOTOS = Augmentation()
SHAPES = Augmentation(crop=0.6, flip=False, jitter=0.2)


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Reader of images `(channels, height, width)` in bytes, of any size each: float32 `(items, channels, size, size)`.

    The shorter side is brought to `resize`, the centre is cut out, and (x / 255 - mean) / std taken. With a generator
    items are augmented in place of that, where there is an `augmentation`.
    """

    size: int
    resize: int | None = None
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    augmentation: Augmentation | None = None

    def __call__(self, images: Sequence[Tensor], generator: Generator | None = None) -> Tensor:
        """These images as one batch."""
        varied = self.augmentation if generator is not None else None
        whole = [with_channels(image, len(self.mean)) for image in images]
        if varied is None or generator is None:
            cut = [centre_cut(image, self.size, self.resize or self.size) for image in whole]
        else:
            cut = [random_cut(image, self.size, varied, generator) for image in whole]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (torch.stack(cut) - mean) / std


def with_channels(image: Tensor, channels: int) -> Tensor:
    """The image with so many channels: grey is repeated, colours are weighed into grey."""
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 1:
        return image.expand(channels, -1, -1)
    if channels == 1 and image.shape[0] == 3:
        weights = torch.tensor(_GREY)[:, None, None]
        return (image.float() * weights).sum(0, keepdim=True).round().to(image.dtype)
    raise ValueError(f"an image has {image.shape[0]} channels, and the model reads {channels}; convert it first.")


def centre_cut(image: Tensor, size: int, resize: int) -> Tensor:
    """The centre of the image at the size, values 0 to 1; the shorter side is brought to `resize` before."""
    height, width = image.shape[-2:]
    scale = max(resize, size) / min(height, width)
    target = max(size, round(height * scale)), max(size, round(width * scale))
    scaled = _resized(image, target)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return scaled[:, top : top + size, left : left + size]


def random_cut(image: Tensor, size: int, augmentation: Augmentation, generator: Generator) -> Tensor:
    """A random part of the image at the size, perhaps mirrored, its colours moved; values 0 to 1."""
    height, width = image.shape[-2:]
    area, aspect, down, right, mirror = torch.rand(5, generator=generator).tolist()
    share = augmentation.crop + (1 - augmentation.crop) * area
    ratio = (3 / 4) ** (1 - 2 * aspect)  # from 3:4 to 4:3
    tall = min(height, max(1, round((share * height * width / ratio) ** 0.5)))
    wide = min(width, max(1, round((share * height * width * ratio) ** 0.5)))
    top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
    cut = _resized(image[:, top : top + tall, left : left + wide], (size, size))
    if augmentation.flip and mirror < 0.5:
        cut = cut.flip(-1)
    return _jittered(cut, augmentation.jitter, generator)


def translated(images: Tensor, generator: Generator, *, probability: float = 0.9, share: float = 0.125) -> Tensor:
    """Normalised images moved by up to a share of their size, zeros coming in, and their colours moved.

    For adaptation on a support set (Zhao et al. 2020, DiffAugment, "color" and "translation"); differentiable.
    """
    moved = [
        _moved(image, generator, share) if torch.rand((), generator=generator) < probability else image
        for image in images
    ]
    return torch.stack(moved)


def _moved(image: Tensor, generator: Generator, share: float) -> Tensor:
    """Brightness by +-0.5, saturation 0 to 2, contrast 0.5 to 1.5, then the shift."""
    light, colour, contrast, down, right = torch.rand(5, generator=generator).tolist()
    image = image + (light - 0.5)
    image = image.mean(0, keepdim=True).lerp(image, 2 * colour)
    image = image.mean().lerp(image, contrast + 0.5)
    rows, columns = (round((2 * at - 1) * share * side) for at, side in zip((down, right), image.shape[-2:]))
    return _shifted(_shifted(image, rows, -2), columns, -1)


def _shifted(image: Tensor, by: int, axis: int) -> Tensor:
    """Moved along an axis; what comes in is zero."""
    if by == 0:
        return image
    side = image.shape[axis]
    kept = image.narrow(axis, max(0, -by), side - abs(by))
    gap = torch.zeros_like(image.narrow(axis, 0, abs(by)))
    return torch.cat([gap, kept] if by > 0 else [kept, gap], axis)


def _jittered(image: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast and saturation, each by a factor of up to 1 +- strength."""
    factors = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    image = (image * factors[0]).clamp(0, 1)
    image = image.mean().lerp(image, factors[1]).clamp(0, 1)
    return image.mean(0, keepdim=True).lerp(image, factors[2]).clamp(0, 1)


def _resized(image: Tensor, target: tuple[int, int]) -> Tensor:
    values = image.float() / 255
    if tuple(image.shape[-2:]) == target:
        return values
    scaled = interpolate(values[None], target, mode="bilinear", antialias=True, align_corners=False)[0]
    return scaled.clamp(0, 1)
