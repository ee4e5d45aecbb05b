"""First values. `matched` leaves start the model exactly as its backbone; `released` ones are the authors'.

With N >= 2 leaves a tensor product has a saddle at zero: where two factors of an update are zero, no leaf ever gets a
gradient. So exactly one order position of B starts at zero, and such a start from elsewhere is refused.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixwright.methods.tensorpoly.config import MATRIX, ORDERED, TensorPolyConfig
from mixwright.methods.tensorpoly.latent import Shapes, shapes

GAIN = math.sqrt(1 / 3)
"""What torch's `calculate_gain("leaky_relu", sqrt(5))` is; the authors take it over sqrt(d_in) as a bound."""
LOGIT_BOUND = 1e-3
"""Z ~ Uniform(-1e-3, 1e-3), as in Poly."""

Draw = torch.Generator | None


def first_factors(config: TensorPolyConfig, d_in: int, d_out: int, draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of A and of B at a site, float32; `draw` None makes them on the meta device. `config` is settled."""
    down, up = shapes(config, d_in, d_out)
    if config.experts in MATRIX:
        bound = (GAIN if config.init == "released" else 1.0) / math.sqrt(d_in)
        return [_uniform(down[0], bound, draw)], [_zeros(up[0], draw)]
    make = _released if config.init == "released" else _matched
    return make(config, d_in, d_out, down, up, draw)


def first_logits(shape: Sequence[int], draw: Draw) -> Tensor:
    """Z before training."""
    return _uniform(tuple(shape), LOGIT_BOUND, draw)


def leaf_std(config: TensorPolyConfig, width: int) -> float:
    """sigma of a leaf under which an entry of A_t has the variance v = 1 / (3 d) of a LoRA's, routing being uniform.

    A term has the variance sigma^2N. Summed (TLoRA) R of them give R sigma^2N; averaged (TensorPoly-I) sigma^2N / R.
    Where leaves are averaged first (II), every factor has sigma^2 / R, and the G products of the entangled form add.
    """
    order, latent, target = config.order, config.num_latent or 1, 1 / (3 * width)
    if config.experts == "tlora":
        return (target / latent) ** (1 / (2 * order))
    if config.experts in ORDERED:
        return math.sqrt(latent) * (target / (config.groups or 1)) ** (1 / (2 * order))
    return (target * latent) ** (1 / (2 * order))


def check_alive(down: Sequence[Tensor], up: Sequence[Tensor], where: str) -> None:
    """Raise ValueError where two factors of the update are zero throughout: no gradient would ever reach any."""
    named = [(f"down.{n}", t) for n, t in enumerate(down)] + [(f"up.{n}", t) for n, t in enumerate(up)]
    zero = [name for name, tensor in named if not tensor.is_meta and not tensor.any()]
    if len(zero) > 1:
        raise ValueError(
            f"{where}: {' and '.join(zero)} are zero throughout, so the gradient of every factor is 0, forever. "
            "Leave one order position at zero and draw the others, as init='matched' does."
        )


def _matched(
    config: TensorPolyConfig, d_in: int, d_out: int, down: Shapes, up: Shapes, draw: Draw
) -> tuple[list[Tensor], list[Tensor]]:
    """Uniform leaves of the standard deviation `leaf_std`, the last of B zero."""
    sides = [(down, leaf_std(config, d_in)), (up, leaf_std(config, d_out))]
    even = config.order >= 3  # the norm of a column is a product of norms, which spreads with the order
    first, second = ([_leaf(shape, std, draw, even=even) for shape in side] for side, std in sides)
    second[-1] = _zeros(up[-1], draw)
    return first, second


def _released(
    config: TensorPolyConfig, d_in: int, d_out: int, down: Shapes, up: Shapes, draw: Draw
) -> tuple[list[Tensor], list[Tensor]]:
    """TLoRA and I: Uniform(-g/sqrt(d_in), g/sqrt(d_in)), also for B. II: Xavier's uniform on (N, R, r, q)."""
    del d_out

    def bound(shape: tuple[int, ...]) -> float:
        if config.experts not in ORDERED:
            return GAIN / math.sqrt(d_in)
        latent, field = shape[0], math.prod(shape[1:])  # torch's fans of a 4-D tensor, of which the code makes use
        return math.sqrt(6 / (latent * field + config.order * field))

    return [_uniform(s, bound(s), draw) for s in down], [_uniform(s, bound(s), draw) for s in up]


def _leaf(shape: tuple[int, ...], std: float, draw: Draw, *, even: bool) -> Tensor:
    leaf = _uniform(shape, math.sqrt(3) * std, draw)
    if even:
        leaf *= std * math.sqrt(shape[-1]) / leaf.norm(dim=-1, keepdim=True)
    return leaf


def _uniform(shape: tuple[int, ...], bound: float, draw: Draw) -> Tensor:
    if draw is None:
        return torch.empty(shape, dtype=torch.float32, device="meta")
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=draw)


def _zeros(shape: tuple[int, ...], draw: Draw) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="meta" if draw is None else "cpu")
