"""A pool back from a saved composition."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mixwright.errors import CatalogError
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel, assemble, maskable
from mixwright.routers.support_set import SupportSetRouter


def restore(config: SmatConfig, backbone: nn.Module, state: Mapping[str, Tensor], ids: Sequence[str]) -> FewShotModel:
    """The model whose `added_state()` was `state`. Raises CatalogError (SHAPE, TENSOR) for tensors that do not fit."""
    router_state, deltas_state = (
        {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}
        for start in ("backbone.router.", "backbone.experts.")
    )
    keys = router_state.get("keys")
    if keys is None or keys.dim() != 2 or len(ids) != config.experts:
        raise CatalogError("TENSOR", "added state", "it has no router for the experts that its config names.")
    router = SupportSetRouter(keys.shape[1], config.experts)
    deltas = SparseDeltas(maskable(backbone, config.include, config.exclude), config.experts, config.granularity)
    try:
        router.load_state_dict(router_state)
        deltas.load_state_dict(deltas_state)
    except RuntimeError as error:
        raise CatalogError("SHAPE", "added state", " ".join(str(error).split())[:200]) from error
    device = next(backbone.parameters()).device
    return assemble(config, backbone, router.to(device), deltas.to(device))
