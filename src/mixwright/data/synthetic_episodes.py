"""Domains without downloads: procedural images and sentences, each class a pattern, each domain a way to show it.

Image domains: `strokes` (three lines), `negative` (the same dark on light, under noise), `dots`, `waves` (two
sinusoids), `cells` (a coarse pattern), `bars` (strokes under stripes). Text domains: words of a language of its own
each, a class being a preference for some of them; `fields` repeats the class's words in a fixed frame, `chat` spells
them in capitals. Classes of two domains are never the same. For tests and demonstrations, and to see a method at work.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor

from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import generator_of
from mixwright.data.pixels import Augmentation, Pixels

Value = TypeVar("Value")
_SYLLABLES = tuple(first + second for first in "bdfgklmnprstvz" for second in "aeiou")


def image_domains(
    names: Sequence[str] = ("strokes", "negative", "dots", "waves", "cells", "bars"),
    *,
    classes: int = 16,
    items: int = 12,
    size: int = 32,
    channels: int = 3,
    seed: int = 0,
    augmentation: Augmentation | None = None,
) -> dict[str, Domain]:
    """The image domains of these names: `items` pictures `size` high and wide of each of `classes` patterns.

    Pixels are bytes and read as -1 to 1. Raises ValueError for a name that there is not.
    """
    return {
        name: Domain(
            name,
            _pictures(name, classes, items, size, channels, seed),
            [label for label in range(classes) for _ in range(items)],
            tuple(f"{name}-{label}" for label in range(classes)),
            groups=tuple(f"{name}-{'early' if 2 * label < classes else 'late'}" for label in range(classes)),
            reader=Pixels(size=size, mean=(0.5,) * channels, std=(0.5,) * channels, augmentation=augmentation),
        )
        for name in names
    }


def text_domains(
    names: Sequence[str] = ("notes", "letters", "fields", "chat"),
    *,
    classes: int = 12,
    items: int = 12,
    words: int = 10,
    seed: int = 0,
) -> dict[str, Domain]:
    """The text domains of these names: sentences of so many words. They are read through a tokenizer: `with_reader`.

    Raises ValueError for a name that there is not.
    """
    return {
        name: Domain(
            name,
            [text for label in range(classes) for text in _sentences(name, label, items, words, seed)],
            [label for label in range(classes) for _ in range(items)],
            tuple(f"{name}-{label}" for label in range(classes)),
        )
        for name in names
    }


def _pictures(name: str, classes: int, items: int, size: int, channels: int, seed: int) -> Tensor:
    painter = _known(name, _PAINTERS, "image")
    own = _own_seed(name, seed)
    pictures = [painter(_Place.drawn(items, size, own, label), generator_of(own, label)) for label in range(classes)]
    grey = torch.cat(pictures).clamp(0, 1)  # (classes * items, size, size)
    tint = 0.6 + 0.4 * torch.rand(len(grey), channels, generator=generator_of(own, -1))
    return (grey[:, None] * tint[:, :, None, None] * 255).round().to(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the pixels of each item of a class fall, `x` and `y` (items, size, size) about -1 to 1, and its noise."""

    x: Tensor
    y: Tensor
    noise: Tensor
    generator: Generator

    @classmethod
    def drawn(cls, items: int, size: int, seed: int, label: int) -> "_Place":
        """Turned, sheared, scaled and shifted a little, each item in its own way."""
        generator = generator_of(seed, 1_000_000 + label)
        turn, shear, grow, right, down = (torch.rand(5, items, 1, 1, generator=generator) * 2 - 1).unbind()
        axis = torch.linspace(-1, 1, size)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        angle, scale = 0.26 * turn, 1 + 0.15 * grow
        across, along = x - 0.12 * right + 0.15 * shear * y, y - 0.12 * down
        turned = angle.cos() * across + angle.sin() * along, angle.cos() * along - angle.sin() * across
        noise = torch.randn(items, size, size, generator=generator)
        return cls(turned[0] * scale, turned[1] * scale, noise, generator)


Painter = Callable[[_Place, Generator], Tensor]
"""(where pixels fall, what the class follows from) -> how bright they are, 0 to 1: (items, size, size)."""


def _strokes(place: _Place, of_class: Generator) -> Tensor:
    """Three lines, each between two of the class's points."""
    ends = torch.rand(3, 2, 2, generator=of_class) * 1.6 - 0.8
    return torch.stack([_line(place, start, end) for start, end in ends]).amax(0)


def _negative(place: _Place, of_class: Generator) -> Tensor:
    return 0.9 - 0.8 * _strokes(place, of_class) + 0.12 * place.noise


def _bars(place: _Place, of_class: Generator) -> Tensor:
    """Strokes, and stripes across the picture whose place says nothing."""
    phase = torch.rand(len(place.x), 1, 1, generator=place.generator) * math.tau
    rows = torch.linspace(0, 5 * math.tau, place.x.shape[-1])[None, :, None]
    return 0.75 * _strokes(place, of_class) + 0.25 * (rows + phase).sin().clamp_min(0)


def _dots(place: _Place, of_class: Generator) -> Tensor:
    """Six dots at the class's places."""
    centres = torch.rand(6, 2, generator=of_class) * 1.6 - 0.8
    distance = torch.stack([(place.x - x) ** 2 + (place.y - y) ** 2 for x, y in centres]).amin(0)
    return (-distance / 0.012).exp() + 0.05 * place.noise


def _waves(place: _Place, of_class: Generator) -> Tensor:
    """The sum of two sinusoids of the class's directions and lengths, with any phase."""
    waves = torch.rand(2, 2, generator=of_class) * 22 - 11
    phases = torch.rand(2, len(place.x), 1, 1, generator=place.generator) * math.tau
    parts = [(x * place.x + y * place.y + phase).sin() for (x, y), phase in zip(waves, phases)]
    return 0.5 + 0.25 * torch.stack(parts).sum(0) + 0.05 * place.noise


def _cells(place: _Place, of_class: Generator) -> Tensor:
    """A pattern of five by five fields, light or dark."""
    pattern = torch.rand(5, 5, generator=of_class).round()
    rows, columns = (((axis + 1) * 2.5).long().clamp(0, 4) for axis in (place.y, place.x))
    return 0.15 + 0.7 * pattern[rows, columns] + 0.08 * place.noise


def _line(place: _Place, start: Tensor, end: Tensor) -> Tensor:
    """1 on the line between two points, falling off with the distance from it."""
    step = end - start
    along = ((place.x - start[0]) * step[0] + (place.y - start[1]) * step[1]) / step.square().sum().clamp_min(1e-6)
    along = along.clamp(0, 1)
    distance = (place.x - start[0] - along * step[0]) ** 2 + (place.y - start[1] - along * step[1]) ** 2
    return (-distance / 0.008).exp()


_PAINTERS: Mapping[str, Painter] = {
    "strokes": _strokes,
    "negative": _negative,
    "dots": _dots,
    "waves": _waves,
    "cells": _cells,
    "bars": _bars,
}
_FRAMES: Mapping[str, tuple[str, str]] = {
    "notes": ("", ""),
    "letters": ("dear reader, ", ". yours"),
    "fields": ("id: 1; body: ", "; end"),
    "chat": ("> ", " !"),
}


def _sentences(name: str, label: int, items: int, words: int, seed: int) -> list[str]:
    """Half of the words are out of the class's eight, the others out of the domain's sixty."""
    before, after = _known(name, _FRAMES, "text")
    own = _own_seed(name, seed)
    vocabulary = _words(60, generator_of(own, -1))
    generator = generator_of(own, label)
    liked = _words(8, generator)
    sentences: dict[str, None] = {}  # no two alike
    while len(sentences) < items:
        pools = [liked if place % 2 else vocabulary for place in range(words)]
        text = " ".join(pool[int(torch.randint(len(pool), (1,), generator=generator))] for pool in pools)
        sentences[f"{before}{text.upper() if name == 'chat' else text}{after}"] = None
    return list(sentences)


def _words(number: int, generator: Generator) -> list[str]:
    """Words of two or three syllables."""
    picks = torch.randint(len(_SYLLABLES), (number, 3), generator=generator).tolist()
    return ["".join(_SYLLABLES[pick] for pick in word[: 2 + word[0] % 2]) for word in picks]


def _own_seed(name: str, seed: int) -> int:
    """A seed for each domain."""
    return generator_of(seed, sum(ord(letter) << (8 * place) for place, letter in enumerate(name))).initial_seed()


def _known(name: str, choices: Mapping[str, Value], kind: str) -> Value:
    if name not in choices:
        raise ValueError(f"{name!r} is no synthetic {kind} domain; there are {', '.join(choices)}.")
    return choices[name]
