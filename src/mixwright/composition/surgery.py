"""Put mixtures into a foreign model, and take them out again."""

from collections.abc import Mapping

from torch import nn

from mixwright.composition.channel import Channel
from mixwright.composition.mixture import Mixture


def install(backbone: nn.Module, mixtures: Mapping[str, Mixture], channel: Channel) -> None:
    """Replace the module at each path by its mixture, whose base is that module."""
    for path, mixture in mixtures.items():
        mixture.site, mixture.channel = path, channel
        mixture.train(backbone.training)
        _replace(backbone, path, mixture)


def uninstall(backbone: nn.Module, mixtures: Mapping[str, Mixture]) -> None:
    """Put the bases back."""
    for path, mixture in mixtures.items():
        if mixture.base is None:
            raise ValueError(f"the mixture at {path} has no base to put back.")
        _replace(backbone, path, mixture.base)


def freeze(module: nn.Module) -> None:
    """No parameter of `module` asks for a gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _replace(backbone: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(parent), name, module)
