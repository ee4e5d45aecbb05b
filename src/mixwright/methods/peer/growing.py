"""The verbs of growth, on a layer by itself or at the sites of a composed model."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn

from mixwright.evaluation.neuron_sites import NeuronSite, neuron_sites
from mixwright.methods.peer import growth
from mixwright.methods.peer.growth import Origin


class Growing:
    """What a model whose experts are neurons can do to grow; `site`: one of them, None: all. See `growth.py`."""

    def grow(self, sub_keys: int, site: str | None = None, **options: Any) -> dict[str, range]:
        """Add `sub_keys` times n2 experts that wait: outputs stay the same to the bit. Site -> their ids."""
        return {
            name: growth.grow(one.router, one.experts, sub_keys, **options) for name, one in self._growing(site).items()
        }

    def admit(self, progress: float = 1.0, depth: float | None = None, site: str | None = None) -> None:
        """Let those in that wait, at once or, with `progress` below 1, to a degree."""
        for one in self._growing(site).values():
            growth.admit(one.router, one.experts, progress, depth)

    def reserve_slots(self, slots: int, site: str | None = None) -> None:
        """Let those in that wait by `slots` more per head, behind a gate that starts at zero."""
        for one in self._growing(site).values():
            growth.reserve_slots(one.router, one.experts, slots)

    def freeze_present(self, site: str | None = None) -> None:
        """Only what waits, or has slots of its own, learns from here on."""
        for one in self._growing(site).values():
            growth.freeze_present(one.router, one.experts)

    def origins(self, ids: Iterable[int], site: str | None = None) -> dict[str, list[Origin]]:
        """Site -> when these experts were added, and from what source."""
        wanted = list(ids)
        return {name: growth.origins(one.experts, wanted) for name, one in self._growing(site).items()}

    def _growing(self, site: str | None) -> dict[str, NeuronSite]:
        sites = neuron_sites(cast(nn.Module, self))
        if site is not None and site not in sites:
            raise ValueError(f"no site {site!r}; there are {', '.join(sites)}.")
        return {name: one for name, one in sites.items() if site in (None, name)}
