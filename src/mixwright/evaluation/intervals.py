"""Bootstrap intervals: how far a mean over examples would move if the examples had been drawn again."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, its 95 % percentile interval, its standard error, and the number of examples behind it."""

    value: float
    low: float
    high: float
    stderr: float
    n: int

    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0.0 or self.high < 0.0


def resampled_means(
    values: Float[Tensor, "rows n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[Tensor, "resamples rows"]:
    """The means of n examples drawn with replacement, `resamples` times.

    Every row sees the same draws, so that differences between rows are paired.
    """
    n = values.shape[1]
    if n == 0:
        raise ValueError("an interval needs at least one example.")
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(resamples, n, dtype=torch.float64)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))
    return counts @ values.double().T / n


def interval(value: float, draws: Float[Tensor, " resamples"], n: int, level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap draws around a point value."""
    tail = (1.0 - level) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(value, low, high, float(draws.double().std()), n)


def bootstrap_mean(values: Float[Tensor, " n"], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of `values` (Efron 1979, percentile method)."""
    draws = resampled_means(values[None], resamples=resamples, seed=seed)[:, 0]
    return interval(float(values.double().mean()), draws, len(values))


def paired_difference(
    ours: Float[Tensor, " n"], theirs: Float[Tensor, " n"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The mean of ours - theirs over the same examples."""
    return bootstrap_mean(ours.double() - theirs.double(), resamples=resamples, seed=seed)
