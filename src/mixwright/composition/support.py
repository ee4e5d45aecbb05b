"""Labelled examples in whatever form a person has them, as a support set on the model's device, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mixwright.data.episodes import Episode, check_support
from mixwright.ops.rows import Inputs
from mixwright.routing import SupportSet

Given = SupportSet | Episode | tuple[Any, Any]
"""A support set; an episode, whose queries are not looked at; or inputs and labels, the latter numbers or names."""

Read = Callable[[Any], Inputs]
"""Raw items (texts, pictures) as the backbone reads them."""


@dataclass(frozen=True)
class Labelled:
    """A support set with the names of its classes, by label."""

    support: SupportSet
    classes: tuple[str, ...]


def labelled(given: Given, like: Tensor, read: Read | None = None) -> Labelled:
    """`given` as a support set on the device of `like`, its fractions in that tensor's dtype.

    Labels that are names are numbered in alphabetical order. Raises ValueError or TypeError naming what is wrong: an
    empty support, one class, a class without items, NaN, labels that do not go with the items.
    """
    names: tuple[str, ...] = ()
    if isinstance(given, Episode):
        inputs, labels = given.support, given.labels
        names = tuple(str(name) for name in given.meta.get("classes", ()))
    elif isinstance(given, SupportSet):
        inputs, labels = given.inputs, given.labels
    elif isinstance(given, tuple) and len(given) == 2:  # pyright: ignore[reportUnnecessaryIsInstance]  a border
        inputs, labels = given
    else:
        raise TypeError(f"support: a {type(given).__name__}; expected a SupportSet, an Episode, or (inputs, labels).")
    if not isinstance(labels, Tensor):
        labels, names = _numbered(labels)
    read_in = placed(inputs, like, read)
    labels = labels.to(like.device)
    check_support(read_in, labels)
    ways = int(labels.max()) + 1
    return Labelled(SupportSet(read_in, labels), names if len(names) == ways else tuple(map(str, range(ways))))


def placed(inputs: Any, like: Tensor, read: Read | None = None) -> Inputs:
    """Inputs of any kind on the device of `like`, fractions in its dtype: tensors, arrays, or what `read` takes.

    Raises TypeError for what is no batch of items, ValueError for numbers that make no tensor of fractions or integers.
    """
    if isinstance(inputs, Mapping):
        named = cast(Mapping[str, Any], inputs)
        return {name: _moved(_tensor(value), like) for name, value in named.items()}
    if inputs is None or isinstance(inputs, int | float | complex):
        raise TypeError(f"inputs: {inputs!r}; expected tensors, arrays, texts, pictures, or paths of pictures.")
    if not isinstance(inputs, Tensor) and not hasattr(inputs, "__array__"):
        items: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
        if items and hasattr(items[0], "__array__") and not hasattr(items[0], "save"):  # pictures are read
            return placed(_stacked([_tensor(item) for item in items]), like, read)
        if items and not isinstance(items[0], int | float | list | tuple):
            if read is None:
                raise TypeError(
                    f"inputs: items of {type(items[0]).__name__}, and nothing is known that reads them; give tensors, "
                    "or `reader=`, a function that makes a batch of them."
                )
            return placed(read(items), like)
        inputs = items
    return _moved(_tensor(inputs), like)


def _tensor(values: Any) -> Tensor:
    try:
        found = torch.as_tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"inputs: they make no tensor ({reason}); give items of one shape, all numbers.") from error
    if found.is_complex():
        raise ValueError(f"inputs: of {found.dtype}; expected fractions or whole numbers.")
    return found


def _stacked(items: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        first, other = sorted(shapes)[:2]
        raise ValueError(f"inputs: items of shape {first} and of shape {other}; bring them to one size.")
    return torch.stack(list(items))


def _moved(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _numbered(labels: Any) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers as they are; names by their place in the alphabet."""
    listed = [labels] if isinstance(labels, str) else list(labels.tolist() if hasattr(labels, "tolist") else labels)
    if not listed or not any(isinstance(label, str) for label in listed):
        found = torch.as_tensor(listed)
        return (found.long() if not listed else found), ()
    strange = next((label for label in listed if not isinstance(label, str)), None)
    if strange is not None:
        raise TypeError(f"labels: both names and {strange!r}; give names, or numbers, alone.")
    names = sorted(set(listed))
    places = {name: place for place, name in enumerate(names)}
    return torch.tensor([places[label] for label in listed], dtype=torch.long), tuple(names)


def refuse_whole_pixels(inputs: Inputs, what: str) -> None:
    """Raises ValueError for images as whole numbers, which a backbone would take for fractions 255 times too large."""
    pixels = inputs if isinstance(inputs, Tensor) else inputs.get("pixel_values")
    if pixels is not None and not pixels.is_floating_point():
        raise ValueError(
            f"{what}: images of {pixels.dtype}; the backbone reads fractions. Give pictures or their paths, which are "
            "read as it wants them, or pixels that were scaled and normalised."
        )


def shapes_of(inputs: Inputs) -> str:
    """What items look like, for messages."""
    if isinstance(inputs, Tensor):
        return f"shape {tuple(inputs.shape[1:])}"
    return ", ".join(f"{name} {tuple(tensor.shape[1:])}" for name, tensor in inputs.items())
