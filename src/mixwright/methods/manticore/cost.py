"""What a hybrid costs, before anything is run for long: numbers, operations, memory, and what decoding keeps.

Un-discretised inference costs the sum of the components that act somewhere, weights and operations both, and the
projectors: K sum_m (2 D d_m + D + d_m) numbers and 2 sum_k sum_m D d_m multiplications per token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.eval_mode import eval_mode
from mixwright.evaluation.decode_state import LayerState, decode_state
from mixwright.evaluation.operations import counted
from mixwright.methods.manticore.model import EMBEDDING, HEAD, HybridModel, slots_of

TOKENS = 64
MOST_TOKENS = 512
"""Where operations are compared, they are counted over texts of the data's length, but of no more than this."""


@dataclass(frozen=True, kw_only=True)
class ComponentCost:
    """One component. `flops`: per token, by slot; `acts_at`: the slots where it acts. `working`: bytes alive at once in
    its pass over `tokens` tokens."""

    name: str
    acts_at: tuple[str, ...]
    parameters: int
    weight_bytes: int
    flops: dict[str, float]
    state: tuple[LayerState, ...]
    working: int

    @property
    def acts(self) -> bool:
        """Whether it acts anywhere."""
        return bool(self.acts_at)

    def state_bytes(self, tokens: int) -> int:
        """Of its cache, for one text of so many tokens."""
        return sum(layer.bytes(tokens) for layer in self.state)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a hybrid costs as it stands; components that act nowhere cost nothing to run.

    `tokens`: the length of the text over which operations were counted: those of attention grow with it.
    """

    components: tuple[ComponentCost, ...]
    projector_parameters: int
    projector_flops: float
    tokens: int

    @property
    def parameters(self) -> int:
        """Numbers of all components and projectors."""
        return self.projector_parameters + sum(part.parameters for part in self.components)

    @property
    def flops_per_token(self) -> float:
        """Of one forward, by token: every component that acts, and the projectors where several do."""
        return self.projector_flops + sum(sum(part.flops.values()) for part in self._acting())

    @property
    def pruned_flops(self) -> float:
        """Of one forward, by token, without the layers that act nowhere: what `HybridModel.pruned` leaves."""
        return self.projector_flops + sum(part.flops[slot] for part in self._acting() for slot in part.acts_at)

    @property
    def dearest(self) -> ComponentCost:
        """The component that costs most by itself."""
        return max(self.components, key=lambda part: sum(part.flops.values()))

    def state_bytes(self, tokens: int, texts: int = 1) -> int:
        """Of all caches while so many texts of so many tokens are decoded."""
        return texts * sum(part.state_bytes(tokens) for part in self._acting())

    def peak_bytes(self, tokens: int, texts: int = 1) -> int:
        """An estimate for inference: weights, caches, and what the components' passes hold, scaled from one text."""
        weights = sum(part.weight_bytes for part in self.components) + 4 * self.projector_parameters
        working = sum(part.working for part in self._acting()) * texts * max(1.0, tokens / self.tokens)
        return int(weights + working) + self.state_bytes(tokens, texts)

    def plain(self, tokens: int = 1024) -> dict[str, Any]:
        """For records."""
        return {
            "parameters": self.parameters,
            "projector_parameters": self.projector_parameters,
            "flops_per_token": self.flops_per_token,
            "counted_over_tokens": self.tokens,
            "decode_state_bytes": {"tokens": tokens, "bytes": self.state_bytes(tokens)},
            "peak_bytes": {"tokens": tokens, "bytes": self.peak_bytes(tokens)},
            "components": {
                part.name: {
                    "acts": part.acts,
                    "parameters": part.parameters,
                    "flops_per_token": sum(part.flops.values()),
                    "flops_by_slot": part.flops,
                    "state_bytes_per_token": sum(layer.per_token for layer in part.state),
                    "state_bytes_constant": sum(layer.constant for layer in part.state),
                }
                for part in self.components
            },
        }

    def text(self, tokens: int = 1024) -> str:
        """For people."""
        alone = sum(self.dearest.flops.values())
        lines = [
            f"{self.parameters:,} parameters, {self.projector_parameters:,} of them in projectors",
            f"{_scaled(self.flops_per_token, 'FLOPs')} per token (counted over {self.tokens} tokens), "
            f"{self.flops_per_token / max(alone, 1.0):.2f} times {self.dearest.name} alone",
            f"{_scaled(self.peak_bytes(tokens), 'B')} of memory at {tokens} tokens, about; "
            f"{_scaled(self.state_bytes(tokens), 'B')} of it what decoding keeps",
        ]
        for part in self.components:
            growing = sum(layer.per_token for layer in part.state)
            fixed = sum(layer.constant for layer in part.state)
            lines.append(
                f"{part.name}: {part.parameters:,} parameters, {_scaled(sum(part.flops.values()), 'FLOPs')} per token, "
                f"cache of {growing:,} bytes per token and {fixed:,} besides{'' if part.acts else '; acts nowhere'}"
            )
        return "\n".join(lines)

    def lines(self, tokens: int = 1024) -> list[tuple[str, str, str]]:
        """What, how much, remark: for pages."""
        estimate = "an estimate: weights, what decoding keeps, and what passes of components by themselves hold"
        kept = f"what decoding keeps of a text: all caches and states, after {tokens:,} tokens"
        counted = f"{self.dearest.name} alone: {_scaled(sum(self.dearest.flops.values()), '')}"
        return [
            ("Parameters in all", f"{self.parameters:,}", f"{self.projector_parameters:,} of them in projectors"),
            ("FLOPs per token", _scaled(self.flops_per_token, ""), f"counted over {self.tokens} tokens; {counted}"),
            (f"Peak memory at {tokens:,} tokens", _scaled(self.peak_bytes(tokens), "B"), estimate),
            (f"Decode state at {tokens:,} tokens", _scaled(self.state_bytes(tokens), "B"), kept),
            *(
                (f"Decode state of {part.name}", _scaled(part.state_bytes(tokens), "B"), _grows(part))
                for part in self._acting()
            ),
        ]

    def _acting(self) -> Iterator[ComponentCost]:
        return (part for part in self.components if part.acts)


def cost(model: HybridModel, tokens: int = TOKENS) -> Cost:
    """Count what `model` costs, by a pass of each component alone over `tokens` tokens; nothing of it is changed."""
    table = flops_by_slot(model, tokens)
    slots = slots_of(model.backbone)
    parts: list[ComponentCost] = []
    for at, (name, component) in enumerate(zip(model.experts, model.components, strict=True)):
        flops = {slot: table.flops[row][at] for row, slot in enumerate(slots)}
        parts.append(
            ComponentCost(
                name=name,
                acts_at=tuple(model.acts_at(name)),
                parameters=sum(p.numel() for p in component.parameters()),
                weight_bytes=sum(p.numel() * p.element_size() for p in component.parameters()),
                flops=flops,
                state=decode_state(component),
                working=table.working[at],
            )
        )
    projectors = [
        p for slot, m in model.mixtures.items() if slot not in (EMBEDDING, HEAD) for p in m.experts.parameters()
    ]
    return Cost(
        components=tuple(parts),
        projector_parameters=sum(p.numel() for p in projectors),
        projector_flops=sum(_projecting(model)),
        tokens=tokens,
    )


@dataclass(frozen=True)
class Counted:
    """`flops`: per token, slots x models. `working`: bytes that were alive at once in each component's pass."""

    flops: tuple[tuple[float, ...], ...]
    working: tuple[int, ...]

    def blocks(self) -> Float[Tensor, "blocks models"]:
        """F_km, for the price of mixture weights in a search."""
        return torch.tensor(self.flops[1:-1], dtype=torch.float64)


def flops_by_slot(model: HybridModel, tokens: int = TOKENS) -> Counted:
    """Operations per token of each component at each slot, when it runs alone; norms after the last layer count there.

    Matrix products, convolutions and attention as torch counts them, and one for each number that is written besides,
    since the scans of state-space models are written out in such steps where no kernel is installed.
    """
    columns: list[list[float]] = []
    working: list[int] = []
    for at, component in enumerate(model.components):
        by_section, peak = _counted(model, at, component, tokens)
        columns.append([by_section.get(slot, 0.0) / tokens for slot in slots_of(model.backbone)])
        working.append(peak)
    return Counted(tuple(zip(*columns, strict=True)), tuple(working))


def counting_length(model: HybridModel, tokens: int) -> int:
    """The length of the texts over which operations are compared: the data's, if the components read so much."""
    limit = getattr(model.backbone.config, "max_position_embeddings", None)
    return min(tokens, MOST_TOKENS, limit or MOST_TOKENS)


def _counted(model: HybridModel, at: int, component: nn.Module, tokens: int) -> tuple[dict[str, float], int]:
    hybrid, parts = model.backbone, model.backbone.parts[at]
    sections: dict[nn.Module, str] = {component.get_submodule(parts.head): HEAD}
    for k, run in enumerate(hybrid.runs[at]):
        if run:
            sections[parts.layer(component, run[0])] = f"blocks.{k}"
    device = next(component.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with eval_mode(component), counted(sections, EMBEDDING) as seen:
        component(input_ids=ids)
    return {slot: float(seen.products[slot] + seen.elementwise[slot]) for slot in slots_of(hybrid)}, seen.peak


def _projecting(model: HybridModel) -> Iterator[float]:
    """Operations per token of the projectors of each block where several components may act."""
    for slot, mixture in model.mixtures.items():
        live = [at for at, name in enumerate(model.experts) if slot in model.acts_at(name)]
        if slot in (EMBEDDING, HEAD) or len(live) < 2:
            continue
        for at in live:
            for side in ("enter", "leave"):
                yield from (2.0 * p.numel() for p in getattr(mixture.experts, side)[at].parameters() if p.dim() == 2)


def projector_parameters(widths: Sequence[int], num_blocks: int) -> int:
    """K sum_m (2 D d_m + D + d_m): the numbers of linear projectors with biases."""
    wide = max(widths)
    return num_blocks * sum(2 * wide * width + wide + width for width in widths)


def _grows(part: ComponentCost) -> str:
    growing, fixed = sum(one.per_token for one in part.state), sum(one.constant for one in part.state)
    return f"{growing:,} bytes with every token, and {fixed:,} besides"


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
