"""A few gradient steps on one support set: weights that nobody keeps but the classifier that asked for them.

Nothing is trained in place: steps are taken on copies, so the model is what it was whatever happens. What is begun from
are the weights that the support set chose (Chen et al. 2024, section 4; Hu et al. 2022 for the loop).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.composition.episodic import EpisodicModel
from mixwright.data.pixels import translated
from mixwright.ops.prototypes import SCALE, Centre, centres, cosine_scores
from mixwright.ops.rows import count, join
from mixwright.routing import SupportSet

Tuned = Literal["full", "lora", "layernorm"]

RATES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
STEPS = 50
RANK, ALPHA = 8, 32.0
_LORA_FACTOR = 10.0

_SEPARATE = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "q", "v", "to_q", "to_v")
_FUSED = ("qkv", "c_attn", "query_key_value", "in_proj")


class Diverged(ValueError):
    """The steps led to a loss that is not finite."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is tuned: every weight (`full`), low-rank changes of queries and values (`lora`, rank 8, alpha 32, ten times
    the rate), or the affine parameters of normalisation (`layernorm`); by AdamW at `rate`, `steps` times.

    `augment`: the items that are classified are varied, those of which prototypes are made are not; images alone.
    """

    kind: Tuned
    rate: float
    steps: int = STEPS
    augment: bool = False
    centre: Centre = "mean"
    seed: int = 0


def tune(model: EpisodicModel, support: SupportSet, start: Mapping[str, Tensor], tuning: Tuning) -> dict[str, Tensor]:
    """The weights that these steps lead to from `start`, the weights in place of pretrained ones; all of them plain.

    Prototypes are made anew in each step, with gradients. Raises ValueError where the backbone has
    nothing of the kind to be tuned, Diverged where the loss is not finite.
    """
    base = {name: start.get(name, tensor).detach() for name, tensor in model.pristine().items()}
    change = _change(model.backbone, base, tuning)
    if tuning.rate == 0 or tuning.steps == 0:
        return dict(start)
    learned = list(change.parameters())
    rate = tuning.rate * (_LORA_FACTOR if tuning.kind == "lora" else 1.0)
    optimizer = torch.optim.AdamW(learned, lr=rate)
    generator = torch.Generator().manual_seed(tuning.seed)
    with torch.enable_grad():
        for _ in range(tuning.steps):
            loss = _loss(model, support, {**start, **change()}, tuning, generator)
            if not bool(loss.isfinite()):
                raise Diverged(f"adaptation at the rate {tuning.rate:g} led to a loss that is not finite; lower it.")
            for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned, allow_unused=True), strict=True):
                parameter.grad = gradient
            optimizer.step()
    return {**start, **{name: tensor.detach() for name, tensor in change().items()}}


def folds(labels: Tensor, number: int, seed: int = 0) -> list[Tensor]:
    """Rows of the support in so many parts, the items of each class spread over them; every class keeps one at least.

    An item that is alone in its class is in none of the parts.
    """
    draw = torch.Generator().manual_seed(seed)
    parts: list[list[int]] = [[] for _ in range(number)]
    offset = 0
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero()[:, 0].cpu()
        if len(rows) < 2:
            continue
        for place, row in enumerate(rows[torch.randperm(len(rows), generator=draw)].tolist()):
            parts[(place + offset) % number].append(row)
        offset += len(rows)
    return [torch.tensor(sorted(part), dtype=torch.long) for part in parts if part]


def _loss(
    model: EpisodicModel, support: SupportSet, weights: Mapping[str, Tensor], tuning: Tuning, generator: torch.Generator
) -> Tensor:
    inputs, shots = support.inputs, count(support.inputs)
    if tuning.augment:
        if not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise ValueError("augment: only images are varied; leave it out for these items.")
        inputs = join(inputs, translated(inputs.float(), generator).to(inputs.dtype))
    features = model.features(inputs, weights).float()
    prototypes = centres(features[:shots], support.labels, int(support.labels.max()) + 1, tuning.centre)
    return cross_entropy(cosine_scores(features[-shots:], prototypes, SCALE), support.labels)


class _Dense(nn.Module):
    """Whole tensors, learned in float32."""

    def __init__(self, base: Mapping[str, Tensor], names: Sequence[str]) -> None:
        super().__init__()
        self.names, self.dtypes = list(names), [base[name].dtype for name in names]
        self.values = nn.ParameterList([base[name].float().clone() for name in names])

    def forward(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {n: v.to(dtype) for n, v, dtype in zip(self.names, self.values, self.dtypes, strict=True)}


class _LowRank(nn.Module):
    """W + (alpha / rank) B A for the rows of queries and of values (Hu et al. 2021); B is zero at first."""

    def __init__(self, base: Mapping[str, Tensor], found: Mapping[str, bool], seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.base = {name: base[name] for name in found}
        self.turned = dict(found)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        self.rows: list[tuple[str, slice]] = []
        for name, turned in found.items():
            weight = base[name].T if turned else base[name]
            parts = 3 if _leaf(name) in _FUSED else 1
            height, width = weight.shape[0] // parts, weight.shape[1]
            for part in (0, 2) if parts == 3 else (0,):
                self.rows.append((name, slice(part * height, (part + 1) * height)))
                bound = 1 / math.sqrt(width)
                down = torch.empty(RANK, width).uniform_(-bound, bound, generator=draw)
                self.down.append(down.to(weight.device))
                self.up.append(torch.zeros(height, RANK, device=weight.device))

    def forward(self) -> dict[str, Tensor]:
        """The changed weights by name."""
        changed = {name: (w.T if self.turned[name] else w).float().clone() for name, w in self.base.items()}
        for (name, rows), down, up in zip(self.rows, self.down, self.up, strict=True):
            changed[name][rows] += (ALPHA / RANK) * up @ down
        return {n: (w.T if self.turned[n] else w).to(self.base[n].dtype) for n, w in changed.items()}


def _change(backbone: nn.Module, base: Mapping[str, Tensor], tuning: Tuning) -> nn.Module:
    """What is learned. Raises ValueError where the backbone has none of it."""
    if tuning.kind == "lora":
        found = {
            name: not isinstance(backbone.get_submodule(name.rpartition(".")[0]), nn.Linear)
            for name, tensor in base.items()
            if tensor.dim() == 2 and name.endswith(".weight") and _leaf(name) in (*_SEPARATE, *_FUSED)
        }
        if not found:
            raise ValueError("lora: this backbone has no layers for queries and values; take full or layernorm.")
        return _LowRank(base, found, tuning.seed)
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    if tuning.kind == "layernorm":
        norms = {path for path, module in backbone.named_modules() if "norm" in type(module).__name__.lower()}
        names = [name for name in names if name.rpartition(".")[0] in norms]
        if not names:
            raise ValueError("layernorm: this backbone has no normalisation with parameters; take full or lora.")
    return _Dense(base, names)


def _leaf(name: str) -> str:
    """The name of the layer that a weight is of."""
    return name.split(".")[-2] if "." in name else ""
