"""Put mixtures into a foreign model, and take them out again."""

from collections.abc import Mapping

from torch import nn

from mixwright.composition.channel import Channel
from mixwright.composition.entry import Entry
from mixwright.composition.mixture import Mixture


def install(backbone: nn.Module, mixtures: Mapping[str, Mixture], channel: Channel) -> None:
    """Replace the module at each path by its mixture, whose base is that module, or which replaces it.

    A layer that the backbone holds under several paths is replaced at all of them, by the one mixture.
    """
    held = _paths(backbone)
    for path, mixture in mixtures.items():
        stands = backbone.get_submodule(path)
        mixture.site, mixture.channel = path, channel
        if mixture.base is None:
            mixture.replaced = stands
        mixture.train(backbone.training)
        if isinstance(_owner(backbone, path), nn.TransformerEncoderLayer):
            mixture.register_forward_hook(_nothing)  # torch's fused layer reads weights past a module without hooks
        _replace(backbone, held[id(stands)], mixture)
        if mixture.carried is not None:
            first = backbone.get_submodule(mixture.entry)
            entry = Entry(first, mixture.carried, channel, replaced=mixture.base is None).train(backbone.training)
            _replace(backbone, held[id(first)], entry)


def uninstall(backbone: nn.Module, mixtures: Mapping[str, Mixture]) -> None:
    """Put back what stood there."""
    held = _paths(backbone)
    for mixture in mixtures.values():
        assert mixture.bare is not None
        _replace(backbone, held[id(mixture)], mixture.bare)
        if mixture.carried is not None:
            entry = backbone.get_submodule(mixture.entry)
            assert isinstance(entry, Entry)
            _replace(backbone, held[id(entry)], entry.base)


def freeze(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """No parameter of `module` asks for a gradient any more; returns those that did."""
    asked = tuple(parameter for parameter in module.parameters() if parameter.requires_grad)
    for parameter in asked:
        parameter.requires_grad_(False)
    return asked


def _owner(backbone: nn.Module, path: str) -> nn.Module:
    return backbone.get_submodule(path.rpartition(".")[0])


def _nothing(*_: object) -> None:
    return None


def _paths(backbone: nn.Module) -> dict[int, list[str]]:
    """Every path of every module, in one walk."""
    found: dict[int, list[str]] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


def _replace(backbone: nn.Module, paths: list[str], new: nn.Module) -> None:
    for path in paths:
        setattr(_owner(backbone, path), path.rpartition(".")[2], new)
