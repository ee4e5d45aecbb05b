"""Mixtures back from the tensors of a saved composition, checked against the backbone that they go to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mixwright.errors import CatalogError
from mixwright.experts.lora import LoraExperts
from mixwright.sites import linear_sites


@dataclass(frozen=True, slots=True)
class SiteState:
    """The stored tensors of one site: its router's and its experts', by their names inside each."""

    router: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    experts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of_router(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part of the router, such as `scores`, by their names inside it."""
        return {name.removeprefix(f"{part}."): t for name, t in self.router.items() if name.startswith(f"{part}.")}


def of_whole(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `ComposedModel.added_state` apart: those of sites, and those of the whole model by their names."""
    whole = {name.removeprefix("whole."): tensor for name, tensor in state.items() if name.startswith("whole.")}
    return {name: tensor for name, tensor in state.items() if not name.startswith("whole.")}, whole


def by_site(
    state: Mapping[str, Tensor], backbone: nn.Module, among: Iterable[str] | None = None
) -> dict[str, SiteState]:
    """The tensors of `ComposedModel.added_state`, by site in the backbone's order.

    `among`: the layers that a mixture may stand at, in that order; the linear ones unless given. Raises CatalogError
    (TENSOR) for a name that is no tensor of a mixture at one of them.
    """
    sites = dict.fromkeys(linear_sites(backbone) if among is None else among)
    found: dict[str, SiteState] = {}
    for name, tensor in state.items():
        part = next((part for part in ("router", "experts") if f".{part}." in name), "")
        site, _, rest = name.partition(f".{part}.")
        if not part or site not in sites:
            kind = "linear layer" if among is None else "layer"
            raise CatalogError("TENSOR", name[:80], f"it belongs to no {kind} of this backbone.")
        getattr(found.setdefault(site, SiteState()), part)[rest] = tensor
    return {site: found[site] for site in sites if site in found}


def lora_experts(state: SiteState, where: str, base: nn.Module) -> LoraExperts:
    """LoRA experts from their tensors, for a site with this base.

    Raises CatalogError: TENSOR for missing ones, SHAPE for ones that do not fit each other or the base.
    """
    site = linear_sites(base)[""]
    lacking = sorted({"down", "up", "scale", "slot"} - set(state.experts))
    if lacking:
        raise CatalogError("TENSOR", where, f"the experts' tensors {', '.join(lacking)} are missing.")
    down, up, scale, slot = (state.experts[name] for name in ("down", "up", "scale", "slot"))
    fits = down.dim() == up.dim() == 3 and scale.dim() == slot.dim() == 1
    fits = fits and down.shape[2] == site.d_in and up.shape[1] == site.d_out and down.shape[1] == up.shape[2]
    fits = fits and down.shape[0] == up.shape[0] == scale.shape[0]
    rows = sorted((int(row), expert) for expert, row in enumerate(slot.tolist()) if row >= 0)
    if not fits or [row for row, _ in rows] != list(range(down.shape[0])):
        raise CatalogError(
            "SHAPE",
            where,
            f"down {tuple(down.shape)}, up {tuple(up.shape)}, scale {tuple(scale.shape)}, slot {tuple(slot.shape)} fit "
            f"neither each other nor this layer of ({site.d_in}, {site.d_out}).",
        )
    return LoraExperts(down, up, scale, slot.shape[0], [expert for _, expert in rows])
