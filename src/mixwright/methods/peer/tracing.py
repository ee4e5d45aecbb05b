"""Which neurons act, and what the model is without some of them."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.evaluation.neuron_sites import neuron_sites, plain_router, real_tokens
from mixwright.evaluation.neurons import ActingNeuron, NeuronTrace, trace_neurons
from mixwright.methods.peer.growth import Origin, origins
from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition


def ablate(model: nn.Module, ids: Iterable[int] | Tensor, site: str | None = None) -> None:
    """Let the neurons `ids` never be retrieved again at `site`, or anywhere; others move up into their places.

    It is saved with the model; `unablate` takes it back. Raises ValueError for an id that is not in the grid.
    """
    for router in _routers(model, site):
        router.ablated = _marked(router, ids, True)


def unablate(model: nn.Module, ids: Iterable[int] | Tensor | None = None, site: str | None = None) -> None:
    """Let the neurons `ids`, or all, be retrieved again."""
    for router in _routers(model, site):
        left = None if ids is None else _marked(router, ids, False)
        router.ablated = left if left is not None and bool(left.any()) else None


@contextmanager
def ablated(model: nn.Module, ids: Iterable[int] | Tensor, site: str | None = None) -> Generator[None]:
    """Inside the block the neurons `ids` are never retrieved."""
    before = [(router, router.ablated) for router in _routers(model, site)]
    try:
        ablate(model, ids, site)
        yield
    finally:
        for router, mask in before:
            router.ablated = mask


def explain(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, NeuronTrace]:
    """Site -> what its neurons did in one pass of `model` over these inputs, in eval mode; parts sum to the output.

    In a composed model tokens that an attention mask leaves out have gates of zero.
    """
    sites = neuron_sites(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, Condition]) -> None:
            del module
            seen.setdefault(name, []).append(real_tokens(*args))

        return keep

    hooks = [site.router.register_forward_pre_hook(keeper(name)) for name, site in sites.items()]
    try:
        with eval_mode(model):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    traces: dict[str, NeuronTrace] = {}
    with eval_mode(model):
        for name, passes in seen.items():
            x, counted = (torch.cat(parts)[None] for parts in zip(*passes, strict=True))  # a layer may take pieces
            traces[name] = trace_neurons(sites[name].router, sites[name].experts, x, Condition(token_mask=counted))
    return traces


def origins_of(model: nn.Module, site: str, neurons: Iterable[ActingNeuron]) -> list[Origin]:
    """Where neurons that acted at `site` came from: the step at which growth added each, and its source."""
    _routers(model, site)
    return origins(neuron_sites(model)[site].experts, [neuron.id for neuron in neurons])


def _routers(model: nn.Module, site: str | None) -> list[ProductKeyRouter]:
    sites: Mapping[str, Any] = neuron_sites(model)
    if site is not None and site not in sites:
        raise ValueError(f"no site {site!r}; there are {', '.join(sites)}.")
    return [plain_router(one.router) for name, one in sites.items() if site in (None, name)]


def _marked(router: ProductKeyRouter, ids: Iterable[int] | Tensor, out: bool) -> Tensor:
    """The router's mask with some ids marked, as a tensor of its own."""
    device = router.bias_first.device
    chosen = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), dtype=torch.int64, device=device)
    wrong = chosen[(chosen < 0) | (chosen >= router.num_experts)]
    if len(wrong):
        raise ValueError(f"id {int(wrong[0])}: the grid has {router.num_experts} experts, with ids from 0.")
    held = router.ablated
    mask = torch.zeros(router.num_experts, dtype=torch.bool, device=device) if held is None else held.clone()
    mask[chosen] = out
    return mask
