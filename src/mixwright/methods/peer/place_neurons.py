"""The neurons of a feed-forward layer where it stands in a backbone, also where no module is the whole of it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.inputs import example_inputs
from mixwright.methods.peer.feed_forward import Place
from mixwright.methods.peer.neurons import Neurons, Stage, read_neurons

_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far a backbone's own pass may be off, of the largest output; half precision rounds more than this tells."""


def neurons_at(backbone: nn.Module, place: Place) -> Neurons:
    """What stands at `place`, read as neurons. Raises ValueError for a layer that is not what it would have to be.

    Where a backbone keeps a layer in two places, what acts between them is looked for in the block that holds both,
    and what was read is compared with what a pass of the backbone makes of it.
    """
    if not place.entry:
        return read_neurons(backbone.get_submodule(place.path), place.path)
    refusal: ValueError | None = None
    for stages in _sequences(backbone, place):
        try:
            found = read_neurons(stages, f"{place.entry} ... {place.path}")
        except ValueError as error:
            refusal = refusal or error
            continue
        _refuse_more(backbone, place, found)
        return found
    raise refusal or ValueError(
        f"{place.entry} ... {place.path}: no activation was found between these two layers of the block."
    )


def _sequences(backbone: nn.Module, place: Place) -> Iterator[list[Stage]]:
    """Ways from the first linear layer of a block to the second: the module around the first, or what lies beside."""
    first, second = backbone.get_submodule(place.entry), backbone.get_submodule(place.path)
    shared = _block(place)
    owner = place.entry.rpartition(".")[0]
    if owner != shared:
        yield [backbone.get_submodule(owner), second]
    block = backbone.get_submodule(shared)
    functions = [value for value in vars(block).values() if callable(value) and not isinstance(value, nn.Module)]
    modules = [child for child in block.children() if not list(child.parameters()) and not list(child.children())]
    between_them: list[Any] = [*modules, *(f for f in functions if _maps_tensors(f))]
    for between in between_them:
        if not isinstance(between, nn.Dropout | nn.Identity):
            yield [first, between, second]


def _block(place: Place) -> str:
    """The path of the innermost module that holds both halves."""
    one, other = place.entry.split("."), place.path.split(".")
    same = 0
    while same < min(len(one), len(other)) and one[same] == other[same]:
        same += 1
    return ".".join(one[:same])


def _maps_tensors(function: object) -> bool:
    try:
        return isinstance(function(torch.zeros(2)), Tensor)  # type: ignore[operator]
    except Exception:
        return False  # an attribute of a foreign module that is some other function


def _refuse_more(backbone: nn.Module, place: Place, found: Neurons) -> None:
    """Raise ValueError where the backbone does something more between the halves than was read."""
    inputs = example_inputs(backbone)
    limit = _CLOSE.get(found.rows.dtype)
    if inputs is None or limit is None:
        return
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module, args
        seen.append(output)

    hooks = (
        backbone.get_submodule(place.entry).register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        backbone.get_submodule(place.path).register_forward_hook(keep),
    )
    try:
        with torch.no_grad(), eval_mode(backbone):
            backbone(**inputs)
            x, y = seen[:2]
            gap = (found(x) - y).abs().max() / y.abs().max().clamp_min(1e-30)
    finally:
        for hook in hooks:
            hook.remove()
    if float(gap) > limit:
        raise ValueError(
            f"{place.entry} ... {place.path} can't be read as neurons: in a pass of the backbone they miss its output "
            f"by {float(gap):.1e} of its size, so something more than {found.activation} acts between the two layers."
        )
