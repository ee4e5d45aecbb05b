"""Sparse interpolated experts (Chen et al. 2024), from top to bottom.

1. Support set: its frozen features, averaged by class, go through the router: weights alpha (M,) (`SupportSetRouter`);
   with `mixture: block`, which the paper has not, a row of them for each block of the backbone.
2. Masks: z_m = hard concrete of logits L_m (`ops.hard_concrete`), the same map in training and serving.
3. Weights of the episode: theta = theta_pre + (sum_m alpha_m z_m) * delta (`SparseDeltas`), one delta for all experts.
4. Queries: cosines to the class means of the support under theta, times 10 (`ops.prototypes`).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.features import width_of
from mixwright.composition.model import Composition
from mixwright.composition.route import Route
from mixwright.composition.routes import find_route
from mixwright.composition.support import Given
from mixwright.config import encode
from mixwright.experts.maskable import maskable
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import METHOD, SmatConfig
from mixwright.methods.smat.fresh import Experts, fresh_experts, refuse_huge
from mixwright.routers.support_set import SupportSetRouter
from mixwright.routing import Routing

if TYPE_CHECKING:
    from mixwright.catalog.store import Catalog
    from mixwright.methods.smat.exporting import ExportedPool


def compose(config: SmatConfig, backbones: Sequence[nn.Module], catalog: "Catalog | None" = None) -> "FewShotModel":
    """A pool of fresh experts around one backbone, whose change is zero: until it is trained it acts as the backbone.

    Everything random depends on `config.seed`. Raises ValueError for globs that select nothing and for a backbone whose
    features have no known width, or that has no two blocks where each shall have a mixture.
    """
    if len(backbones) != 1 or catalog is not None:
        raise ValueError("smat trains a pool of its own on one backbone; give no catalogue.")
    (backbone,) = backbones
    shapes = maskable(backbone, config.include, config.exclude)
    device = next(backbone.parameters()).device
    width = config.feature_width or width_of(backbone, config.features)
    refuse_huge(shapes, config)
    deltas = fresh_experts(config, shapes).to(device)
    router = SupportSetRouter(width, config.experts, config.seed, len(deltas.blocks)).to(device)
    if config.router == "uniform":
        nn.init.zeros_(router.keys)
    return assemble(config, backbone, router, deltas)


def assemble(config: SmatConfig, backbone: nn.Module, router: SupportSetRouter, deltas: Experts) -> "FewShotModel":
    """The model of these parts."""
    kind = "custom" if callable(config.features) else config.features
    described = Composition(
        method=METHOD.name,
        config=encode(replace(config, features=kind)),  # type: ignore[arg-type]
        backbone=provenance(backbone),
        citation=METHOD.paper.bibtex,
    )
    names = tuple(f"expert-{i}" for i in range(deltas.num_experts))
    model = FewShotModel(backbone, router, deltas, names, features=config.features, composition=described)
    model.train(backbone.training)
    return model


class FewShotModel(EpisodicModel):
    """A backbone with a pool of sparse interpolated experts: a support set picks its own weights, with no gradient."""

    @property
    def router(self) -> SupportSetRouter:
        """Chooses among the experts."""
        found = self.mixture.router
        assert isinstance(found, SupportSetRouter)
        return found

    @property
    def deltas(self) -> SparseDeltas:
        """The experts: masks over one change. Raises ValueError where each has a change of its own."""
        found = self.mixture.experts
        if not isinstance(found, SparseDeltas):
            raise ValueError(
                "deltas: with changes='own' the experts are no masks over one change; model.mixture.experts are what "
                "they are."
            )
        return found

    def added_state(self) -> dict[str, Tensor]:
        """What goes to disk: router and multipliers, the experts packed, and the backbone's digests; see `packing`."""
        from mixwright.methods.smat.stored import stored_state

        plain = super().added_state()
        if not isinstance(self.mixture.experts, SparseDeltas):
            return plain
        return stored_state(self, plain, self.composition.config.get("storage", "exact"))

    def export(
        self,
        support: Given | Route | Routing | str,
        folder: str | Path | None = None,
        *,
        strength: float | None = None,
        sparse: bool = False,
    ) -> "dict[str, Tensor] | ExportedPool":
        """One adaptation for those who have no pool: a plain state dict or, with `folder`, a folder; see `exporting`.

        What is given is as for `commit`. The folder holds the whole model as its own library saves it or, `sparse`, an
        adapter for PEFT.
        """
        from mixwright.methods.smat import exporting, sparse_adapter

        if folder is None:
            if sparse:
                raise ValueError("export: a sparse adapter is a folder of files; give the folder.")
            return exporting.export_state(self, support, strength)
        write = sparse_adapter.export_peft if sparse else exporting.export_folder
        return write(self, support, Path(folder), strength)

    def card_lines(self) -> list[str]:
        """What the pool changes, and what it was tuned on."""
        from mixwright.methods.smat.pool_card import pool_lines

        return pool_lines(self)

    def num_added_parameters(self) -> int:
        """Numbers that are trained: router, shared change, masks, multipliers."""
        return sum(tensor.numel() for tensor in self.kept_tensors())

    def sparsity(self) -> Float[Tensor, " experts"]:
        """The share of weights that each expert leaves as pretrained, counted."""
        return self.mixture.experts.sparsity()

    def route(self, support: Given, *, resamples: int = 32, seed: int = 0) -> Route:
        """Which experts a support set chooses, how sure and how new it is; see `composition.routes.find_route`."""
        return find_route(self, support, resamples=resamples, seed=seed)
