"""Whether a model knows when it is unsure: its loss on the tokens that it is surest of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.evaluation.neuron_sites import neuron_sites
from mixwright.routers.retriever import Retrieval

FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True, kw_only=True)
class RiskCoverage:
    """`risks[i]` is the mean loss of the `kept[i]` share of tokens that the model is surest of."""

    kept: tuple[float, ...]
    risks: tuple[float, ...]

    @property
    def falls(self) -> bool:
        """Whether keeping fewer tokens always means a lower loss."""
        return all(fewer < more for more, fewer in zip(self.risks, self.risks[1:], strict=False))

    @property
    def area(self) -> float:
        """The mean risk over the fractions; lower is better."""
        return sum(self.risks) / len(self.risks)


def risk_coverage(
    losses: Float[Tensor, " tokens"], confidence: Float[Tensor, " tokens"], fractions: Sequence[float] = FRACTIONS
) -> RiskCoverage:
    """The mean loss of the surest tokens, for each fraction that is kept. Raises ValueError for unequal lengths."""
    if losses.shape != confidence.shape or losses.dim() != 1 or not len(losses):
        raise ValueError(
            f"{tuple(losses.shape)} losses, {tuple(confidence.shape)} confidences; give one for each token."
        )
    ordered = losses.double()[confidence.argsort(descending=True, stable=True)]
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    counts = [max(1, round(fraction * len(ordered))) for fraction in fractions]
    return RiskCoverage(kept=tuple(fractions), risks=tuple(float(means[count - 1]) for count in counts))


class _Recorder:
    """Keeps the coverage of every real token."""

    detail = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, found: Retrieval, counted: Bool[Tensor, "*batch"] | None) -> None:
        assert found.coverage is not None
        heads = found.coverage.shape[-1]
        rows = found.coverage.detach().reshape(-1, heads)
        self.seen.append(rows if counted is None else rows[counted.reshape(-1)])


def coverages(model: nn.Module, data: Iterable[Any]) -> dict[str, Float[Tensor, "tokens heads"]]:
    """Site -> the coverage of every real token of `data`, which are inputs, or mappings of keyword arguments.

    The model runs as it is, in eval mode: where a fallback stands at a site, what is measured is what it leaves.
    """
    recorders = {name: _Recorder() for name in neuron_sites(model)}
    routers = {name: site.router for name, site in neuron_sites(model).items()}
    try:
        for name, router in routers.items():
            router.observers.append(recorders[name])
        with eval_mode(model):
            for inputs in data:
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for name, router in routers.items():
            router.observers.remove(recorders[name])
    return {name: torch.cat(recorder.seen) for name, recorder in recorders.items()}
