"""How two experts differ: in their settings, their sites, and at each common site in the update itself.

The update of a site is D = scale * up @ down. Inner products of two updates need no d_out x d_in matrix:
<D1, D2> = scale1 * scale2 * sum((up1^T up2) * (down1 down2^T)).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mixwright.catalog.adapter import Expert, LoraFactors

_SETTINGS = (
    "rank",
    "alpha",
    "rslora",
    "targets",
    "excluded",
    "fan_in_fan_out",
    "dtype",
    "base_model",
    "task",
    "licence",
)


@dataclass(frozen=True, kw_only=True)
class SiteDifference:
    """One common site: the cosine of the two updates, their Frobenius norms, and that of their difference."""

    cosine: float
    norm_a: float
    norm_b: float
    norm_difference: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What sets two experts apart. `cosine` is that of the two whole updates, every site together."""

    a: str
    b: str
    settings: dict[str, tuple[Any, Any]]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    sites: dict[str, SiteDifference]
    cosine: float


def difference(a: Expert, b: Expert) -> Difference:
    """Compare two experts of one catalogue."""
    card_a, card_b = asdict(a.card), asdict(b.card)
    common = [path for path in a.factors if path in b.factors]
    return Difference(
        a=a.id,
        b=b.id,
        settings={name: (card_a[name], card_b[name]) for name in _SETTINGS if card_a[name] != card_b[name]},
        only_a=tuple(path for path in a.factors if path not in b.factors),
        only_b=tuple(path for path in b.factors if path not in a.factors),
        sites={path: _site(a.factors[path], b.factors[path]) for path in common},
        cosine=cosine(a.factors, b.factors),
    )


def cosine(a: Mapping[str, LoraFactors], b: Mapping[str, LoraFactors]) -> float:
    """The cosine of two whole updates; a site that only one adapts counts in that one's norm. 0 where one is zero."""
    inner = sum(product(a[path], b[path]) for path in a if path in b)
    squares = sum(product(f, f) for f in a.values()) * sum(product(f, f) for f in b.values())
    return inner / math.sqrt(squares) if squares > 0 else 0.0


def product(a: LoraFactors, b: LoraFactors) -> float:
    """The inner product <D_a, D_b> of two updates of one site, in float64."""
    left: Tensor = a.up.double().T @ b.up.double()
    right: Tensor = a.down.double() @ b.down.double().T
    return a.scale * b.scale * float((left * right).sum())


def _site(a: LoraFactors, b: LoraFactors) -> SiteDifference:
    aa, bb, ab = max(product(a, a), 0.0), max(product(b, b), 0.0), product(a, b)
    return SiteDifference(
        cosine=ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 0.0,
        norm_a=math.sqrt(aa),
        norm_b=math.sqrt(bb),
        norm_difference=math.sqrt(max(aa + bb - 2 * ab, 0.0)),
    )
