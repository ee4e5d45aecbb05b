"""Put mixtures into a foreign model, and take them out again."""

from collections.abc import Mapping

from torch import nn

from mixwright.composition.channel import Channel
from mixwright.composition.mixture import Mixture


def install(backbone: nn.Module, mixtures: Mapping[str, Mixture], channel: Channel) -> None:
    """Replace the module at each path by its mixture, whose base is that module.

    A layer that the backbone holds under several paths is replaced at all of them, by the one mixture.
    """
    held = _paths(backbone)
    for path, mixture in mixtures.items():
        mixture.site, mixture.channel = path, channel
        mixture.train(backbone.training)
        if isinstance(_owner(backbone, path), nn.TransformerEncoderLayer):
            mixture.register_forward_hook(_nothing)  # torch's fused layer reads weights past a module without hooks
        _replace(backbone, held[id(backbone.get_submodule(path))], mixture)


def uninstall(backbone: nn.Module, mixtures: Mapping[str, Mixture]) -> None:
    """Put the bases back."""
    held = _paths(backbone)
    for path, mixture in mixtures.items():
        if mixture.base is None:
            raise ValueError(f"the mixture at {path} has no base to put back.")
        _replace(backbone, held[id(mixture)], mixture.base)


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
