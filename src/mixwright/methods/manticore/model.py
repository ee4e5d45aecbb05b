"""Hybrids of Manticore: components of different architectures between projectors, mixed by weights per block."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.backbones.hf import provenance
from mixwright.composition.components import dtype_of, ledger_of
from mixwright.composition.ledger import Ledger
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel, Composition
from mixwright.composition.probe import Probe, Seen
from mixwright.experts.base import AbstractExperts
from mixwright.experts.blocks import BlockExperts, EmbeddingExperts, HeadExperts
from mixwright.methods.manticore.config import METHOD, ManticoreConfig
from mixwright.methods.manticore.vocabularies import of_one_vocabulary
from mixwright.ops.digest import fingerprint, weights_digest
from mixwright.routers.base import AbstractRouter
from mixwright.routers.mixture_weights import MixtureWeights
from mixwright.routers.routed_weights import RoutedMixtureWeights

if TYPE_CHECKING:
    from mixwright.backbones.hybrid import HybridBackbone
    from mixwright.catalog.store import Catalog
    from mixwright.methods.manticore.cost import Cost

EMBEDDING, HEAD = "embedding", "head"


class HybridModel(ComposedModel):
    """A composed model whose experts are components: whole language models, cut into blocks."""

    backbone: "HybridBackbone"

    @property
    def components(self) -> tuple[nn.Module, ...]:
        """The component models, in the order of `experts`, their names."""
        return tuple(self.backbone.components)

    @property
    def mixture_weights(self) -> Float[Tensor, "blocks models"]:
        """alpha of every block. Setting them sets the embedding's to the first row and the head's to the last."""
        return torch.stack([self.row(slot).weights().detach() for slot in self._blocks()])

    @mixture_weights.setter
    def mixture_weights(self, weights: Any) -> None:
        rows = torch.as_tensor(weights, dtype=torch.float64)
        if rows.shape != (self.backbone.num_blocks, len(self.experts)):
            raise ValueError(
                f"mixture_weights of shape {tuple(rows.shape)}: expected {self.backbone.num_blocks} blocks x "
                f"{len(self.experts)} components ({', '.join(self.experts)})."
            )
        for slot, row in zip((EMBEDDING, HEAD, *self._blocks()), (rows[0], rows[-1], *rows)):
            self.row(slot).set(row)  # a row that the head shares with block 0 (rows=block) is block 0's

    @property
    def embedding_weights(self) -> Float[Tensor, " models"]:
        """alpha of the embedding."""
        return self.row(EMBEDDING).weights().detach()

    @embedding_weights.setter
    def embedding_weights(self, weights: Any) -> None:
        self.row(EMBEDDING).set(torch.as_tensor(weights))

    @property
    def head_weights(self) -> Float[Tensor, " models"]:
        """alpha of the head."""
        return self.row(HEAD).weights().detach()

    @head_weights.setter
    def head_weights(self, weights: Any) -> None:
        self.row(HEAD).set(torch.as_tensor(weights))

    def discretise(self) -> None:
        """Each block keeps the component with the largest weight, the earliest on a tie: one run of layers per block.

        The embedding is then that of the first block's, and the head that of the last's: a block understands its own
        component's embedding best, whatever weight that had in a mixture.
        """
        self.mixture_weights = torch.nn.functional.one_hot(self.mixture_weights.argmax(-1), len(self.experts))

    def row(self, slot: str) -> MixtureWeights:
        """The mixture weights of a slot, of which input-dependent ones have the static part: `embedding`, `blocks.0`
        and so on, `head`."""
        router = self.mixtures[slot].router
        row = router.static if isinstance(router, RoutedMixtureWeights) else router
        assert isinstance(row, MixtureWeights)
        return row

    def ledger(self) -> Ledger:
        """Every component's licence, where it was read, and what they ask together.

        Raises CatalogError (LICENCE) where nobody says it; state it: `licences={name: SPDX}` of the config.
        """
        return ledger_of(self)

    def pruned(self) -> "HybridModel":
        """A hybrid that computes the same without what its mixture weights, each of one component alone, leave unused.

        Components that act nowhere are gone, the others have the layers that act, and projectors are none. Raises
        ValueError for a hybrid that mixes: `discretise` it first.
        """
        from mixwright.methods.manticore.pruning import pruned_hybrid

        return pruned_hybrid(self)

    def export(self, folder: str | Path) -> "HybridModel":
        """Write `pruned()` as a folder that `mixwright.load` reads, with the licences of what is left; returns it."""
        small = self.pruned()
        small.save_pretrained(folder)
        return small

    def cost(self, tokens: int = 64) -> "Cost":
        """Numbers, operations per token, memory, and what decoding keeps, counted over a text of so many tokens."""
        from mixwright.methods.manticore.cost import cost

        return cost(self, tokens)

    def cost_text(self) -> str:
        """`cost` in words: of several whole models."""
        return self.cost().text()

    def kept_tensors(self) -> list[Tensor]:
        """Components are saved too, where training changed them."""
        return [*super().kept_tensors(), *self.backbone.components.parameters()]

    def _blocks(self) -> tuple[str, ...]:
        return tuple(f"blocks.{k}" for k in range(self.backbone.num_blocks))


def compose(
    config: ManticoreConfig,
    backbones: Sequence[nn.Module],
    catalog: "Catalog | None" = None,
    tokenizers: Sequence[Any] | None = None,
) -> HybridModel:
    """A hybrid of `backbones`, causal language models; nothing of them is changed. It needs no catalogue.

    `tokenizers`: of the components, where they do not lie beside them. Raises ValueError for fewer than two components,
    and IncompatibleExpert for what can't be cut into blocks or mixed, and for different tokenizers.
    """
    from mixwright.backbones.hybrid import HybridBackbone

    if catalog is not None:
        raise ValueError("manticore composes whole models and reads no catalogue; leave catalog out.")
    if len(backbones) < 2 and config.layers is None:
        raise ValueError(f"backbones: {len(backbones)} given; a hybrid has two components or more.")
    names = names_of(config, backbones)
    components = of_one_vocabulary(config, backbones, names, tokenizers)
    hybrid = HybridBackbone(components, config.num_blocks, names, vocab_size=config.vocab_size, layers=config.layers)
    model = _assembled(config, hybrid, backbones)
    if config.mixture_weights is not None:
        model.mixture_weights = config.mixture_weights
    return model


def names_of(config: ManticoreConfig, backbones: Sequence[nn.Module]) -> tuple[str, ...]:
    """The components' names: as given, or the last part of their paths, or their model types; never twice the same."""
    if config.names is not None:
        if len(config.names) != len(backbones) or len(set(config.names)) != len(backbones):
            raise ValueError(f"config.names: {config.names}; expected {len(backbones)} different names.")
        return config.names
    found: list[str] = []
    for backbone in backbones:
        settings: Any = getattr(backbone, "config", None)
        name = PurePath(provenance(backbone)["path"]).name or str(getattr(settings, "model_type", "component"))
        count = sum(other.rpartition("-")[0] == name or other == name for other in found)
        found.append(f"{name}-{count + 1}" if count else name)
    return tuple(found)


def _assembled(config: ManticoreConfig, hybrid: "HybridBackbone", origins: Sequence[nn.Module]) -> HybridModel:
    slots = {path: hybrid.get_submodule(path) for path in slots_of(hybrid)}
    shared = _row(config, hybrid) if config.rows == "block" else None
    mixtures: dict[str, Mixture] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for path, slot in slots.items():
            run: Any = slot.run
            experts: AbstractExperts
            if path == EMBEDDING:
                experts = EmbeddingExperts(run, hybrid.widths)
            elif path == HEAD:
                experts = HeadExperts(run, hybrid.widths)
            else:
                experts = BlockExperts(run, hybrid.widths, config.projectors)
            paper_row = path in (EMBEDDING, "blocks.0", HEAD)
            row = shared if shared is not None and paper_row else _row(config, hybrid)
            if path == EMBEDDING and isinstance(row, RoutedMixtureWeights):
                row.embed = run
            mixtures[path] = Mixture(None, row, experts)
    described = Composition(
        method=METHOD.name,
        config=asdict(config),
        backbone={"kind": "causal", "architecture": "Hybrid"},
        experts=[_entry(name, component) for name, component in zip(hybrid.names, origins)],
        citation=METHOD.paper.bibtex,
    )
    seen = Probe({path: Seen(order, "decoder", order) for order, path in enumerate(slots)}, ran=True)
    return HybridModel(hybrid, mixtures, hybrid.names, described, seen)


def _row(config: ManticoreConfig, hybrid: "HybridBackbone") -> AbstractRouter:
    static = MixtureWeights(len(hybrid.names))
    if config.weights == "static":
        return static
    return RoutedMixtureWeights(static, hybrid.width, config.prefix if config.weights == "sequence" else 0)


def slots_of(hybrid: "HybridBackbone") -> tuple[str, ...]:
    """Paths of the slots, in the order of the pass."""
    return (EMBEDDING, *(f"blocks.{k}" for k in range(hybrid.num_blocks)), HEAD)


def copies(components: Sequence[nn.Module]) -> list[nn.Module]:
    """The components again, to be trained: those of the caller stay as they are."""
    return [copy.deepcopy(component) for component in components]


def _entry(name: str, component: nn.Module) -> dict[str, Any]:
    known = provenance(component)
    weights = {"fingerprint": fingerprint(component), "digest": weights_digest(component), "dtype": dtype_of(component)}
    return {"id": name, "backbone": {**known, **weights}}
