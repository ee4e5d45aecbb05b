"""A composed model whose experts are neurons: what can be asked of it, and done to it, beside running it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixwright.composition.model import ComposedModel
from mixwright.config import decode
from mixwright.evaluation.neuron_sites import neurons_of, plain_router
from mixwright.experts.neuron import NeuronExperts
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.verbs import NeuronVerbs
from mixwright.routers.product_key import ProductKeyRouter

if TYPE_CHECKING:
    from mixwright.evaluation.neuron_usage import UsageMeter

BIASES = (".bias_first", ".bias_second")


class PeerComposedModel(NeuronVerbs, ComposedModel):
    """A composed model whose experts are neurons: the pool has no names, and a neuron goes by its number at a site."""

    @property
    def settings(self) -> PeerConfig:
        """The config that the model was composed with."""
        return decode(PeerConfig, self.composition.config, where="composition.config")

    @property
    def layers(self) -> dict[str, tuple[ProductKeyRouter, NeuronExperts]]:
        """Site -> its router and its neurons, without what may be wrapped around them."""
        return {
            site: (plain_router(mixture.router), neurons_of(mixture.experts)) for site, mixture in self.mixtures.items()
        }

    def added_state(self) -> dict[str, Tensor]:
        """As of any composed model; a table that several sites share is there once, at the first of them.

        Biases that keep sub-keys out are the lowest number of their type, since files hold finite numbers only.
        """
        state, known = super().added_state(), set[int]()
        for site, (_, experts) in self.layers.items():
            if id(experts.table) in known:
                own = f"{site}.experts."
                state = {name: t for name, t in state.items() if not (name.startswith(own) and ".table." in name)}
            known.add(id(experts.table))
        return {name: finite(tensor) if name.endswith(BIASES) else tensor for name, tensor in state.items()}

    def keep_usage(self, *, detail: bool = False) -> "UsageMeter":
        """Count every pass from now on, in what `save_pretrained` writes; see `usage.keep_usage`."""
        from mixwright.methods.peer.usage import keep_usage

        return keep_usage(self, detail=detail)


def finite(bias: Tensor) -> Tensor:
    """A selection bias as it is written."""
    return bias.clamp_min(torch.finfo(bias.dtype).min)


def infinite(bias: Tensor) -> Tensor:
    """A selection bias as it was before it was written."""
    return bias.masked_fill(bias == torch.finfo(bias.dtype).min, -torch.inf)
