"""Experts whose factors are sums of tensor products: TLoRA, TensorPoly-I, TensorPoly-II and entangled order routing."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.factored import AbstractFactored, widened
from mixwright.ops.fused_build import build_factors
from mixwright.ops.low_rank import low_rank_mixed
from mixwright.ops.tensor_gram import order_grams, term_grams, update_products
from mixwright.ops.tensor_product import expand, materialise, mix, project

FEW_TOKENS = 4


class AbstractTensor(AbstractFactored):
    """A and B are sums of products of leaves, one leaf for each order position, cut to the widths."""

    def __init__(
        self,
        down: Sequence[Tensor],
        up: Sequence[Tensor],
        d_in: int,
        d_out: int,
        norm: bool,
        *,
        chooses_by_order: bool,
    ) -> None:
        _refuse_misfit(down, up, d_in, d_out)
        positions = len(down) if chooses_by_order else None
        super().__init__(down[0].shape[0], down[0].shape[-2], d_in, d_out, positions)
        self.down = nn.ParameterList(widened(down))
        self.up = nn.ParameterList(widened(up))
        self.order, self.norm = len(down), norm

    def leaves(self) -> tuple[Tensor, ...]:
        """Those of A by order position, then those of B; asking the lists for them one by one takes longer than a small
        layer does."""
        return (*self.down._parameters.values(), *self.up._parameters.values())  # type: ignore[return-value]


class TensorExperts(AbstractTensor):
    """A_w = sum_s w_s [LN](u_s^(1) x ... x u_s^(N)), B_w likewise: Su et al. 2024, arXiv 2405.16671 (TensorPoly-I).

    The experts are the R rank terms. Constant weights of one make it TLoRA. `norm` is the released code's layer norm of
    each product of two leaves, without affine. Radices may exceed the widths; what is beyond them is cut.
    """

    def __init__(
        self,
        down: Sequence[Float[Tensor, "experts _ _"]],
        up: Sequence[Float[Tensor, "experts _ _"]],
        d_in: int,
        d_out: int,
        norm: bool = False,
    ) -> None:
        super().__init__(down, up, d_in, d_out, norm, chooses_by_order=False)

    def factors(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
        """Both factors by the fused build."""
        down, up, weights = _sides(self.leaves(), weights)
        return build_factors(down, up, weights, self.d_in, self.d_out, self.norm)

    def by_token(
        self, x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "tokens *positions experts"]
    ) -> Float[Tensor, "tokens d_out"]:
        """By mode products; many tokens share the products of all terms, which cost what a mode product of one does."""
        down, up, weights = _sides(self.leaves(), weights)
        x = x.to(weights.dtype)
        if len(x) > FEW_TOKENS:
            terms = materialise(down, self.d_in, self.norm), materialise(up, self.d_out, self.norm)
            return low_rank_mixed(x, *terms, weights)
        hidden = project(x, down, weights, self.norm)
        return expand(hidden, up, weights, self.d_out, self.norm)

    def contribution(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> Float[Tensor, "choices orders experts experts"]:
        """The part of an expert is its rank term, exact with the cut and with the norm."""
        pairs = torch.einsum("cs,cp->csp", weights.double(), weights.double())[..., None, None]
        down, up = (
            term_grams(_wide(leaves), width, self.norm)
            for leaves, width in ((self.down, self.d_in), (self.up, self.d_out))
        )
        return update_products(pairs * down, pairs * up)[:, None]


class OrderedTensorExperts(AbstractTensor):
    """A_w = sum_g [LN](x_n sum_s w_ns u_sg^(n)): every order position chooses among its own leaves.

    One group is TensorPoly-II (Su et al. 2024, arXiv 2405.16671), whose columns are rank-one tensors; several groups,
    summed, are ours (entangled order routing) and lift them to rank `groups`.
    """

    def __init__(
        self,
        down: Sequence[Float[Tensor, "experts groups _ _"]],
        up: Sequence[Float[Tensor, "experts groups _ _"]],
        d_in: int,
        d_out: int,
        norm: bool = False,
    ) -> None:
        super().__init__(down, up, d_in, d_out, norm, chooses_by_order=True)
        self.groups = down[0].shape[1]

    def factors(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
        """Leaves mixed by order position, then multiplied out and summed over the groups."""
        down, up, weights = _sides(self.leaves(), weights)
        ones = weights.new_ones((len(weights), self.groups))
        return build_factors(mix(down, weights), mix(up, weights), ones, self.d_in, self.d_out, self.norm)

    def by_token(
        self, x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "tokens *positions experts"]
    ) -> Float[Tensor, "tokens d_out"]:
        """Leaves mixed for each token, then mode products."""
        down, up, weights = _sides(self.leaves(), weights)
        ones = weights.new_ones((len(weights), self.groups))
        hidden = project(x.to(weights.dtype), mix(down, weights), ones, self.norm)
        return expand(hidden, mix(up, weights), ones, self.d_out, self.norm)

    def contribution(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> Float[Tensor, "choices orders experts experts"]:
        """The part of an expert at an order position: see `order_grams`."""
        wide = weights.double()
        down, up = (
            order_grams(_wide(leaves), wide, width, self.norm)
            for leaves, width in ((self.down, self.d_in), (self.up, self.d_out))
        )
        return update_products(down, up)


def _wide(leaves: Iterable[Tensor]) -> list[Tensor]:
    return [leaf.detach().double() for leaf in leaves]


def _sides(leaves: tuple[Tensor, ...], weights: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The leaves of A, those of B, and the weights in their type, float32 or wider."""
    wide, half = widened(leaves), len(leaves) // 2
    return wide[:half], wide[half:], weights.to(wide[0].dtype)


def _refuse_misfit(down: Sequence[Tensor], up: Sequence[Tensor], d_in: int, d_out: int) -> None:
    if not down or len(down) != len(up):
        raise ValueError(
            f"down has {len(down)} order positions and up {len(up)}; give the same number of leaves to both."
        )
    shapes = {tuple(leaf.shape[:-1]) for leaf in (*down, *up)}
    if len(shapes) > 1:
        raise ValueError(
            f"leaves disagree in all but their last axis: {', '.join(str(shape) for shape in sorted(shapes))}; every "
            "leaf has the same experts, groups and rank."
        )
    for name, leaves, width in (("down", down, d_in), ("up", up, d_out)):
        radices = [leaf.shape[-1] for leaf in leaves]
        product = torch.Size(radices).numel()
        if product < width:
            raise ValueError(
                f"the {name} leaves of radices {' x '.join(map(str, radices))} = {product} do not cover a width of "
                f"{width}; take ceil_radices or exact_radices of the width."
            )
