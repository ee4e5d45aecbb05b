"""The latent experts of one site, by kind: the shapes of their tensors, and the module that holds them."""

from collections.abc import Sequence

from torch import Tensor

from mixwright.experts.factored import AbstractFactored
from mixwright.experts.poly import PolyExperts
from mixwright.experts.tensor import OrderedTensorExperts, TensorExperts
from mixwright.methods.tensorpoly.config import MATRIX, ORDERED, TensorPolyConfig
from mixwright.ops.tensor_product import ceil_radices, exact_radices

Shapes = list[tuple[int, ...]]


def radices(config: TensorPolyConfig, width: int) -> tuple[int, ...]:
    """q_1 ... q_N, the widths of the leaves whose product is cut to `width`."""
    if config.order == 1:
        return (width,)
    return (exact_radices if config.factorization == "exact" else ceil_radices)(width, config.order)


def shapes(config: TensorPolyConfig, d_in: int, d_out: int) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors of A and B: one of each for matrices, N leaves of each for tensors. `config` is settled."""
    rank, latent, groups = config.rank or 0, config.num_latent or 0, config.groups or 0
    if config.experts in MATRIX:
        return [(latent, rank, d_in)], [(latent, rank, d_out)]
    lead = (latent, groups, rank) if config.experts in ORDERED else (latent, rank)
    return [(*lead, q) for q in radices(config, d_in)], [(*lead, q) for q in radices(config, d_out)]


def positions(config: TensorPolyConfig) -> int | None:
    """Order positions or heads that choose apart; None where a layer makes one choice."""
    if config.experts == "mhr":
        return config.heads if config.heads != 1 else None
    return config.order if config.experts in ORDERED else None


def assemble(
    config: TensorPolyConfig, down: Sequence[Tensor], up: Sequence[Tensor], d_in: int, d_out: int
) -> AbstractFactored:
    """The experts whose tensors have the shapes that `shapes` gives."""
    if config.experts in MATRIX:
        return PolyExperts(down[0], up[0], heads=config.heads or 1)
    kind = OrderedTensorExperts if config.experts in ORDERED else TensorExperts
    return kind(down, up, d_in, d_out, norm=config.norm == "pair")
