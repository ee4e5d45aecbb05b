"""float32 to bfloat16 such that the mean is kept: rounded up as often as the part that is lost asks for.

The noise is a hash of (key, row, column), so it needs no generator, does not depend on the number of threads or the
order of rows, and is the same here and in the compiled twin. It ends as MurmurHash3 does (Appleby 2011, public domain).
"""

import torch
from jaxtyping import BFloat16, Float32, Int
from torch import Tensor

_LOW = 0xFFFFFFFF


def noise_key(seed: int, step: int, kind: int) -> int:
    """32 bits for one write of rows: of step `step`, by the update (kind 0) or by a replay up to it (kind 1)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + 2 * step + kind + 1) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) >> 32


def round_stochastically(
    values: Float32[Tensor, "rows width"], ids: Int[Tensor, " rows"], key: int
) -> BFloat16[Tensor, "rows width"]:
    """E[result] = values where the result is finite. `ids` name the rows in their table."""
    bits = values.view(torch.int32)
    noise = _noise(ids.long(), values.shape[1], key)
    carried = (bits.long() + noise).to(torch.int32) >> 16 << 16
    rounded = torch.where(values.isfinite(), carried, bits).view(torch.float32)
    return rounded.to(torch.bfloat16)


def _noise(ids: Tensor, width: int, key: int) -> Tensor:
    """16 random bits for each entry."""
    place = ids[:, None] * width + torch.arange(width, device=ids.device)
    mixed = (place ^ (key + (place >> 32) * 0x9E3779B1)) & _LOW
    mixed = ((mixed ^ (mixed >> 16)) * 0x85EBCA6B) & _LOW
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & _LOW
    return mixed >> 16 ^ mixed & 0xFFFF
