"""Domains as a backbone reads them: texts through the tokenizer beside it, images as its settings say."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from mixwright.backbones.hf import load_tokenizer
from mixwright.backbones.image_settings import (
    image_channels,
    image_side,
    load_image_settings,
    own_settings,
    reads_images,
)
from mixwright.data.collate import Tokenizer
from mixwright.data.domains import Domain
from mixwright.data.encoded import Encoded
from mixwright.data.images import ImageReader, pixels_for
from mixwright.data.pixels import Augmentation, Pixels
from mixwright.data.texts import TextReader

Content = Literal["images", "texts", "values"]


@dataclass(frozen=True)
class DomainReaders:
    """What reads the domains of one backbone; what was read once is kept, together for all of them.

    `images`: the backbone's `preprocessor_config.json`; `image_size`: in place of what that or its config says;
    `length`: tokens of a text that are kept.
    """

    backbone: nn.Module
    tokenizer: Tokenizer | None = None
    images: Mapping[str, Any] | None = None
    image_size: int | None = None
    augmentation: Augmentation | None = None
    length: int = 512

    @classmethod
    def beside(
        cls,
        backbone: nn.Module,
        path: str | Path,
        domains: Iterable[Domain],
        *,
        revision: str | None = None,
        image_size: int | None = None,
        length: int = 512,
    ) -> "DomainReaders":
        """With the tokenizer and the settings that lie beside a backbone, as far as these domains need them.

        Raises ValueError for texts where the backbone reads images, and the other way round; CatalogError for what is
        not there.
        """
        contents = {check_readable(domain, backbone) for domain in domains}
        tokenizer = load_tokenizer(path, revision=revision) if "texts" in contents else None
        images = load_image_settings(path, revision=revision) if "images" in contents else None
        images = images or own_settings(backbone)
        return cls(backbone, tokenizer, images, image_size, length=length)

    def augmenting(self, augmentation: Augmentation | None) -> "DomainReaders":
        """Readers that vary images where they are asked to."""
        return replace(self, augmentation=augmentation)

    def read(self, domain: Domain) -> Domain:
        """The domain, readable. Raises ValueError as `check_readable`, and where a tokenizer or a size is missing."""
        content = check_readable(domain, self.backbone)
        if content == "texts":
            return domain.with_reader(self._texts)
        if content == "images":
            return domain.with_reader(self._pixels if isinstance(domain.items, Tensor) else self._images)
        return domain

    @cached_property
    def _texts(self) -> TextReader:
        if self.tokenizer is None:
            raise ValueError("there are texts to be read and no tokenizer beside the backbone; give one.")
        return TextReader(self.tokenizer, self.length)

    @cached_property
    def _images(self) -> ImageReader:
        return ImageReader(self._pixels)

    @cached_property
    def _pixels(self) -> Pixels:
        size = self.image_size or (None if self.images else image_side(self.backbone))
        channels = image_channels(self.backbone)
        return pixels_for(self.images, size=size, channels=channels, augmentation=self.augmentation)


def check_readable(domain: Domain, backbone: nn.Module) -> Content:
    """What a domain holds. Raises ValueError for texts where the backbone reads images, and the other way round."""
    content, wants_images = content_of(domain), reads_images(backbone)
    if (wants_images is True and content == "texts") or (wants_images is False and content == "images"):
        other = "images" if content == "texts" else "texts"
        raise ValueError(f"domain {domain.name} holds {content}, and the backbone reads {other}; take another of both.")
    return content


def content_of(domain: Domain) -> Content:
    """images, texts, or values that a backbone reads as they are."""
    if isinstance(domain.items, Tensor):
        return "images" if domain.items.dim() == 4 and not domain.items.is_floating_point() else "values"
    first = None if isinstance(domain.items, Mapping) else domain.items[0]
    return "images" if isinstance(first, Encoded) else "texts" if isinstance(first, str) else "values"
