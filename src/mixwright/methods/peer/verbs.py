"""What can be asked of, and done to, a layer or a model of retrieved neurons; each is a function elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from mixwright.evaluation.neuron_sites import NeuronSite
    from mixwright.evaluation.neuron_usage import SiteUsage, UsageMeter
    from mixwright.evaluation.neurons import NeuronTrace
    from mixwright.methods.peer.growth import Origin
    from mixwright.methods.peer.rebalance import Rebalancer
    from mixwright.methods.peer.revival import Revived


class NeuronVerbs(nn.Module):
    """For a layer by itself, whose site is called "layer", and for composed models. Thresholds are by site."""

    def usage(self, *, detail: bool = True) -> "AbstractContextManager[UsageMeter]":
        """Inside the block every pass is counted: see `evaluation/neuron_usage.py`."""
        from mixwright.evaluation.neuron_usage import usage

        return usage(self, detail=detail)

    def explain(self, *inputs: Any, **named: Any) -> "dict[str, NeuronTrace]":
        """Site -> what its neurons did in one pass over these inputs; parts sum to the output: see `tracing.py`."""
        from mixwright.methods.peer.tracing import explain

        return explain(self, *inputs, **named)

    def ablate(self, ids: Iterable[int] | Tensor, site: str | None = None) -> None:
        """Let the neurons `ids` never be retrieved again, at one site or anywhere; saved with the model."""
        from mixwright.methods.peer.tracing import ablate

        ablate(self, ids, site)

    def unablate(self, ids: Iterable[int] | Tensor | None = None, site: str | None = None) -> None:
        """Let the neurons `ids`, or all, be retrieved again."""
        from mixwright.methods.peer.tracing import unablate

        unablate(self, ids, site)

    def ablated(self, ids: Iterable[int] | Tensor, site: str | None = None) -> AbstractContextManager[None]:
        """Inside the block the neurons `ids` are never retrieved."""
        from mixwright.methods.peer.tracing import ablated

        return ablated(self, ids, site)

    def coverage_thresholds(self, data: Iterable[Any], quantile: float) -> dict[str, Tensor]:
        """Site -> the coverage that this share of held-out tokens falls below, for each head: see `unsure.py`."""
        from mixwright.methods.peer.unsure import coverage_thresholds

        return coverage_thresholds(self, data, quantile)

    def flag_unsure(self, thresholds: Mapping[str, Tensor]) -> None:
        """Let every site say which heads are unsure."""
        from mixwright.methods.peer.unsure import flag_unsure

        flag_unsure(self, thresholds)

    def widen_unsure(self, thresholds: Mapping[str, Tensor], wider: int) -> None:
        """Let unsure heads retrieve `wider` experts."""
        from mixwright.methods.peer.unsure import widen_unsure

        widen_unsure(self, thresholds, wider)

    def lean_unsure(self, thresholds: Mapping[str, Tensor], dense: Mapping[str, nn.Module]) -> None:
        """Let a dense layer of each site stand in for what unsure heads missed."""
        from mixwright.methods.peer.unsure import lean_unsure

        lean_unsure(self, thresholds, dense)

    def retrieve_adaptively(self, coverage: float, max_k: int) -> None:
        """Let every head retrieve as few experts as hold `coverage` of its softmax, at most `max_k`."""
        from mixwright.methods.peer.unsure import retrieve_adaptively

        retrieve_adaptively(self, coverage, max_k)

    def retrieve_plainly(self) -> None:
        """Take every fallback and adaptive router out."""
        from mixwright.methods.peer.unsure import retrieve_plainly

        retrieve_plainly(self)

    def rebalancing(self, rate: float = 0.01) -> "AbstractContextManager[Rebalancer]":
        """Inside the block load is counted; call `step` of what is yielded after each step: see `rebalance.py`."""
        from mixwright.methods.peer.rebalance import rebalancing

        return rebalancing(self, rate)

    def revive(
        self,
        data: Iterable[Any],
        used: "Mapping[str, SiteUsage]",
        *,
        losses: Sequence[Tensor] | None = None,
        seed: int = 0,
    ) -> "Revived":
        """Give dead sub-keys, and the rows below them, a new direction; nothing changes yet: see `revival.py`."""
        from mixwright.methods.peer.revival import revive

        return revive(self, data, used, losses=losses, seed=seed)

    def grow(self, sub_keys: int, site: str | None = None, **options: Any) -> dict[str, range]:
        """Add this many sub-keys times n2 experts at `site`, or at every one, kept out until they are admitted; what
        the model says stays the same to the bit. Returns their ids. `options`: see `growth.grow`."""
        from mixwright.methods.peer.growth import grow

        return {name: grow(one.router, one.experts, sub_keys, **options) for name, one in self._sites_at(site).items()}

    def admit(self, progress: float = 1.0, site: str | None = None, depth: float | None = None) -> None:
        """Let the newest experts in, from 0, kept out, to 1, like the others; see `growth.admit`."""
        from mixwright.methods.peer.growth import admit

        for one in self._sites_at(site).values():
            admit(one.router, one.experts, progress, depth)

    def reserve_slots(self, slots: int, site: str | None = None, seed: int = 0) -> None:
        """Let the newest experts in beside the others, neutral at first; see `growth.reserve_slots`."""
        from mixwright.methods.peer.growth import reserve_slots

        for one in self._sites_at(site).values():
            reserve_slots(one.router, one.experts, slots, seed=seed)

    def freeze_present(self, site: str | None = None) -> None:
        """Only what is new learns from here on; see `growth.freeze_present`."""
        from mixwright.methods.peer.growth import freeze_present

        for one in self._sites_at(site).values():
            freeze_present(one.router, one.experts)

    def origins(self, ids: Iterable[int], site: str | None = None) -> "dict[str, list[Origin]]":
        """Site -> when these experts were added, and from what source."""
        from mixwright.methods.peer.growth import origins

        wanted = list(ids)
        return {name: origins(one.experts, wanted) for name, one in self._sites_at(site).items()}

    def _sites_at(self, site: str | None) -> "Mapping[str, NeuronSite]":
        from mixwright.evaluation.neuron_sites import neuron_sites

        sites = neuron_sites(self)
        if site is not None and site not in sites:
            raise ValueError(f"no site {site!r}; there are {', '.join(sites)}.")
        return {name: one for name, one in sites.items() if site in (None, name)}
