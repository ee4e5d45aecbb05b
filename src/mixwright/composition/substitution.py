"""Other tensors in the place of a module's parameters, for as long as a block lasts; gradients flow into them."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def in_place_of(module: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Inside the block the named parameters are these tensors, at every place where a tied one stands.

    What `torch.func.functional_call` does for one call; as a block it also serves layers that are run again in the
    backward pass. Raises ValueError for a name that is no parameter.
    """
    if not weights:
        yield
        return
    places = _places(module)
    strange = next((name for name in weights if name not in places), None)
    if strange is not None:
        raise ValueError(f"{strange}: no parameter of this {type(module).__name__}.")
    before: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for name, tensor in weights.items():
            for owner, leaf in places[name]:
                before.append((owner, leaf, _own(owner)[leaf]))
                _own(owner)[leaf] = tensor
        yield
    finally:
        for owner, leaf, parameter in reversed(before):
            _own(owner)[leaf] = parameter


def _places(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter stands, by its first name."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, owner in module.named_modules():
        for leaf, parameter in _own(owner).items():
            if parameter is not None:
                name = first.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
                found.setdefault(name, []).append((owner, leaf))
    return found


def _own(owner: nn.Module) -> dict[str, Tensor | None]:
    """The parameters of one module, not of those inside it: assigning an attribute would refuse a plain tensor."""
    return vars(owner)["_parameters"]
