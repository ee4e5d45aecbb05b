"""What steps of AdamW in which a row had no gradient come to, in closed form: a lazy row is caught up in one pass.

Source: Loshchilov & Hutter 2019 (AdamW); the replay is ours. After step s a row has parameters p, moments m and v. With
no gradient in the steps j = s+1 .. t, dense AdamW does

    p <- K(s,t) p - m sum_j c_j u_j / (sqrt(v) + eps u_j)        m <- b1^(t-s) m        v <- b2^(t-s) v

    c_j = lr_j b1^(j-s) / (1 - b1^j) K(j,t)   u_j = sqrt(1 - b2^j) b2^(-(j-s)/2)   K(j,t) = prod_(j<l<=t) 1 - lr_l wd_l

u_j grows with j. Where it lies within [a, R a], with its middle u = a (1 + R) / 2 and y = eps u / (sqrt(v) + eps u),

    sum_j c_j u_j / (sqrt(v) + eps u_j) = sum_n y^n M_n / (sqrt(v) + eps u)        M_n = sum_j c_j u_j (1 - u_j / u)^n

whose terms fall at least as fast as ((R-1)/(R+1))^n, whatever v is. So the steps are cut into segments by u; each costs
a division and a short polynomial per number of the row however many steps it stands for, and M_n needs only s and t.
Where sqrt(v) is far above eps, as nearly always, y is small, and three terms about one middle do for all segments.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SPREAD = 1.5
"""R: terms fall by (R-1)/(R+1) = 1/5."""
TERMS = {torch.float32: 10, torch.float64: 22}
TOLERANCE = {torch.float32: 1e-9, torch.float64: 1e-17}
_CELLS = 1 << 16


@dataclass(frozen=True)
class Moments:
    """What of AdamW decides how a row without gradient goes on."""

    beta1: float
    beta2: float
    eps: float

    def horizon(self, dtype: torch.dtype) -> int:
        """Missed steps after which the momentum moves a row by less than this type can hold."""
        ratio = self.beta1 / math.sqrt(self.beta2)
        if not ratio:
            return 1
        return max(1, math.ceil(math.log(TOLERANCE[dtype] * (1 - ratio)) / math.log(ratio)))


@dataclass(frozen=True)
class Replay:
    """For each of several starting steps: the factors of p, m and v, and u and M of each segment."""

    kept: Float[Tensor, " starts"]
    first: Float[Tensor, " starts"]
    second: Float[Tensor, " starts"]
    middles: Float[Tensor, "starts segments"]
    sums: Float[Tensor, "starts segments terms"]
    near: Float[Tensor, "starts 4"]
    """u and M_0 to M_2 of all steps at once, for y below 1e-3."""

    def to(self, device: torch.device) -> "Replay":
        """On another device."""
        return Replay(*(getattr(self, part.name).to(device) for part in fields(self)))


def missed_steps(
    starts: Int[Tensor, " starts"],
    step: int,
    rates: Float[Tensor, " steps"],
    decays: Float[Tensor, " steps"],
    moments: Moments,
    dtype: torch.dtype,
) -> Replay:
    """The replay of the steps after each of `starts` up to `step`, in `dtype`.

    `rates[j]` is the learning rate of step j (from 1), `decays[j]` the sum of log(1 - lr wd) over steps 1 .. j; both on
    the CPU in float64, longer than `step`.
    """
    starts = starts.cpu()
    gaps = (step - starts).double()
    width = int(min(gaps.max().item(), moments.horizon(dtype))) if len(starts) else 1
    each = max(1, _CELLS // width)
    parts = [_segments(part, step, width, rates, decays, moments, TERMS[dtype]) for part in starts.split(each)]
    segments = max((part.middles.shape[1] for part in parts), default=1)
    return Replay(
        kept=(decays[step] - decays[starts]).exp().to(dtype),
        first=(moments.beta1**gaps).to(dtype),
        second=(moments.beta2**gaps).to(dtype),
        middles=torch.cat([_wider(part.middles, segments, 1.0) for part in parts]).to(dtype),
        sums=torch.cat([_wider(part.sums, segments, 0.0) for part in parts]).to(dtype),
        near=torch.cat([part.near for part in parts]).to(dtype),
    )


class _Segments(NamedTuple):
    middles: Float[Tensor, "starts segments"]
    sums: Float[Tensor, "starts segments terms"]
    near: Float[Tensor, "starts 4"]


def _segments(
    starts: Tensor, step: int, width: int, rates: Tensor, decays: Tensor, moments: Moments, terms: int
) -> _Segments:
    """Of these starts, over at most `width` steps after each."""
    after = torch.arange(1, width + 1)
    steps = starts.long()[:, None] + after
    real = steps <= step
    steps = steps.clamp_max(step)
    growth = (-0.5 * math.log(moments.beta2) * after.double()).exp()
    u = (1 - moments.beta2 ** steps.double()).sqrt() * growth
    c = rates[steps] * moments.beta1 ** after.double() / (1 - moments.beta1 ** steps.double())
    c = torch.where(real, c * (decays[step] - decays[steps]).exp(), 0.0)
    segment = ((u / u[:, :1]).log() / math.log(SPREAD)).floor().long().clamp_min(0).masked_fill(~real, 0)
    count = int(segment.max().item()) + 1
    middles = u[:, :1] * SPREAD ** torch.arange(count).double() * (1 + SPREAD) / 2
    powers = (1 - u / middles.gather(1, segment))[..., None].expand(-1, -1, terms).clone()
    powers[..., 0] = c * u
    places = segment[..., None] * terms + torch.arange(terms)
    sums = u.new_zeros((len(starts), count * terms)).scatter_add_(1, places.flatten(1), powers.cumprod(2).flatten(1))
    last = u.gather(1, (real.sum(1, keepdim=True) - 1).clamp_min(0))
    middle = (u[:, :1] + last) / 2
    off, weight = 1 - u / middle, c * u
    near = torch.cat([middle, *((weight * off**n).sum(1, keepdim=True) for n in range(3))], 1)
    return _Segments(middles, sums.unflatten(1, (count, terms)), near)


def _wider(values: Tensor, segments: int, filler: float) -> Tensor:
    wide = values.new_full((len(values), segments, *values.shape[2:]), filler)
    wide[:, : values.shape[1]] = values
    return wide
