"""Back to the pretrained weights: one stage tries things out on components, the next starts from them as they came."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mixwright.config import decode
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose, copies
from mixwright.ops.digest import tensor_digest
from mixwright.training.frozen import combined

KEPT = "aligned."


def keep_for_rewinding(model: HybridModel, pretrained: Sequence[nn.Module]) -> None:
    """Note in the model what *align* left, so that *tune* may start from it on another day: the projectors, and tensors
    of components that are not the pretrained ones, such as the embeddings of a vocabulary that they share."""
    kept = {f"{slot}.{name}": t for slot, m in model.mixtures.items() for name, t in m.experts.state_dict().items()}
    for number, (component, original) in enumerate(zip(model.components, pretrained, strict=True)):
        before = original.state_dict()
        kept |= {
            f"components.{number}.{name}": tensor
            for name, tensor in component.state_dict().items()
            if name not in before or tensor.shape != before[name].shape or not _same(tensor, before[name])
        }
    model.whole = {**forget(model), **{f"{KEPT}{name}": t.detach().cpu().clone() for name, t in kept.items()}}


def forget(model: HybridModel) -> dict[str, Tensor]:
    """What is known of the whole model, less what was kept for rewinding."""
    model.whole = {name: tensor for name, tensor in model.whole.items() if not name.startswith(KEPT)}
    return model.whole


def rewound(model: HybridModel, pretrained: Sequence[nn.Module]) -> HybridModel:
    """A hybrid of the pretrained components, with the projectors that *align* left and the mixture weights of `model`.

    Raises ValueError where nothing was kept for it.
    """
    kept = {name.removeprefix(KEPT): t for name, t in model.whole.items() if name.startswith(KEPT)}
    if not kept:
        raise ValueError(
            "the composition does not say what its projectors were before the search: run stage search of this recipe, "
            "or set config.rewind: false to go on with what it learned."
        )
    fresh = _again(model, pretrained)
    for slot, mixture in fresh.mixtures.items():
        mixture.experts.load_state_dict(_under(kept, f"{slot}."))
    for number, component in enumerate(fresh.components):
        _write(component, _under(kept, f"components.{number}."))
    return fresh


def component_digests(model: HybridModel) -> dict[str, str]:
    """One SHA-256 over every parameter and buffer of each component, by its name."""
    return {name: combined(tensor_digest(part)) for name, part in zip(model.experts, model.components, strict=True)}


def pretrained_digests(names: Sequence[str], pretrained: Sequence[nn.Module]) -> dict[str, str]:
    """The same of components as they came."""
    return {name: combined(tensor_digest(part)) for name, part in zip(names, pretrained, strict=True)}


def weights_digest(model: HybridModel) -> str:
    """One SHA-256 over all that mixture weights are made of."""
    return combined(
        {f"{slot}.{name}": d for slot, m in model.mixtures.items() for name, d in tensor_digest(m.router).items()}
    )


def on_copies(model: HybridModel, pretrained: Sequence[nn.Module]) -> HybridModel:
    """The hybrid with components of its own: what is trained must not be what others start from."""
    given = {id(p) for component in pretrained for p in component.parameters()}
    if not any(id(p) in given for component in model.components for p in component.parameters()):
        return model
    return _again(model, model.components)


def _again(model: HybridModel, components: Sequence[nn.Module]) -> HybridModel:
    """The same hybrid on copies of these components."""
    config = decode(ManticoreConfig, dict(model.composition.config))
    fresh = compose(replace(config, names=model.experts, mixture_weights=None), copies(components))
    fresh.composition, fresh.whole, fresh.tokenizer = model.composition, dict(model.whole), model.tokenizer
    for slot, mixture in fresh.mixtures.items():
        mixture.router.load_state_dict(model.mixtures[slot].router.state_dict())
        mixture.experts.load_state_dict(model.mixtures[slot].experts.state_dict())
    return fresh


@torch.no_grad()
def _write(component: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    held = component.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        held[name].copy_(tensor)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(torch.equal(one.detach().cpu(), other.detach().cpu()))
