"""A pool of sparse interpolated experts as tensors of a file, and back from them."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mixwright.composition.base_digests import digests
from mixwright.composition.restoring import of_whole
from mixwright.errors import CatalogError
from mixwright.experts.maskable import maskable
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.fresh import fresh_experts, refuse_huge
from mixwright.methods.smat.model import FewShotModel, assemble
from mixwright.methods.smat.packing import Storage, pack, unpack
from mixwright.routers.support_set import SupportSetRouter

_EXPERTS, _ROUTER, _PACKED = "backbone.experts.", "backbone.router.", "packed."
_DENSE = ("delta.", "logits.")


def stored_state(model: FewShotModel, plain: Mapping[str, Tensor], storage: Storage) -> dict[str, Tensor]:
    """What of `plain`, the state with every mask, goes to disk: experts packed, and the digests of the backbone."""
    state = {n: t for n, t in plain.items() if not n.removeprefix(_EXPERTS).startswith(_DENSE)}
    packed = {f"{_EXPERTS}{_PACKED}{name}": tensor for name, tensor in pack(model.deltas, storage).items()}
    bound = {f"whole.{name}": tensor for name, tensor in digests(model.backbone, model.pristine()).items()}
    return state | packed | bound


def restore(config: SmatConfig, backbone: nn.Module, state: Mapping[str, Tensor], ids: Sequence[str]) -> FewShotModel:
    """The model whose `added_state()` was `state`.

    Raises CatalogError (SIZE, SHAPE, TENSOR, DTYPE, CONFIG, VALUE) for tensors that do not fit.
    """
    inside, whole = of_whole(state)
    router_state, experts_state = (
        {name.removeprefix(start): tensor for name, tensor in inside.items() if name.startswith(start)}
        for start in (_ROUTER, _EXPERTS)
    )
    keys = router_state.get("keys")
    axes = 3 if config.mixture == "block" else 2
    if keys is None or keys.dim() != axes or not len(ids) == config.experts == len(keys):
        raise CatalogError("TENSOR", "added state", "it has no router for the experts that its config names.")
    try:
        shapes = maskable(backbone, config.include, config.exclude)
    except ValueError as error:
        raise CatalogError("CONFIG", "composition.yaml", str(error)[:300]) from error
    try:
        refuse_huge(shapes, config)
    except ValueError as error:
        raise CatalogError("SIZE", "composition.yaml", str(error)) from error
    try:
        experts = fresh_experts(config, shapes)
    except ValueError as error:
        raise CatalogError("CONFIG", "composition.yaml", str(error)[:300]) from error
    router = SupportSetRouter(keys.shape[-1], config.experts, num_blocks=len(experts.blocks))
    if isinstance(experts, SparseDeltas):
        packed = {n.removeprefix(_PACKED): t for n, t in experts_state.items() if n.startswith(_PACKED)}
        unpack(experts, packed, config.storage)
        dense = {name: tensor for name, tensor in experts.state_dict().items() if name.startswith(_DENSE)}
        experts_state = {n: t for n, t in experts_state.items() if not n.startswith(_PACKED)} | dense
    try:
        router.load_state_dict(router_state)
        experts.load_state_dict(experts_state)
    except RuntimeError as error:
        raise CatalogError("SHAPE", "added state", " ".join(str(error).split())[:200]) from error
    device = next(backbone.parameters()).device
    model = assemble(config, backbone, router.to(device), experts.to(device))
    model.whole.update({name: tensor for name, tensor in whole.items() if not name.startswith(_PACKED)})
    return model
