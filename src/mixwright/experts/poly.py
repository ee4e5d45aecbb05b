"""Poly, MHR and LoRA: experts whose factors are averages of stored ones."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.experts.factored import AbstractFactored, widened
from mixwright.ops.low_rank import low_rank_mixed
from mixwright.ops.tensor_gram import update_products


class PolyExperts(AbstractFactored):
    """A_w = sum_s w_s A_s and B_w = sum_s w_s B_s, Ponti et al. 2022 (Poly), arXiv 2202.13914, section 2.2.

    With `heads` > 1, head h mixes the h-th block of A's input columns and of B's output columns by its own weights:
    Caccia et al. 2023 (MHR), arXiv 2211.03831, section 3. One expert is LoRA (Hu et al. 2021) with alpha 1.
    """

    def __init__(
        self, down: Float[Tensor, "experts rank d_in"], up: Float[Tensor, "experts _ d_out"], heads: int = 1
    ) -> None:
        num_experts, rank, d_in = down.shape
        d_out = up.shape[2]
        if up.shape[:2] != down.shape[:2]:
            raise ValueError(
                f"down has {num_experts} experts of rank {rank}, but up has {up.shape[0]} of rank {up.shape[1]}; "
                "give (experts, rank, d_in) and (experts, rank, d_out)."
            )
        if heads < 1 or d_in % heads or d_out % heads:
            raise ValueError(
                f"heads={heads} does not divide the layer's widths {d_in} and {d_out}; give a common divisor of both."
            )
        super().__init__(num_experts, rank, d_in, d_out, positions=heads if heads > 1 else None)
        self.heads = heads
        self.down, self.up = (nn.Parameter(stored) for stored in widened((down, up)))

    def leaves(self) -> tuple[Tensor, ...]:
        """Both factors of all experts."""
        return self.down, self.up

    def factors(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> tuple[Float[Tensor, "choices rank d_in"], Float[Tensor, "choices rank d_out"]]:
        """sum_s w_s A_s and sum_s w_s B_s, block by block where there are heads."""
        down, up = widened(self.leaves())
        return self._average(down, weights), self._average(up, weights)

    def _average(self, stored: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(stored.dtype)
        if self.positions is None:
            return (weights @ stored.flatten(1)).view(-1, self.rank, stored.shape[2])
        blocks = stored.unflatten(2, (self.heads, -1))
        return torch.einsum("chs,srhi->crhi", weights, blocks).flatten(2)

    def by_token(
        self, x: Float[Tensor, "tokens d_in"], weights: Float[Tensor, "tokens *positions experts"]
    ) -> Float[Tensor, "tokens d_out"]:
        """All experts as two products, weighted between them: sum_s w_s (x A_s), then sum_s w_s (h B_s)."""
        down, up = widened(self.leaves())
        x, weights = x.to(down.dtype), weights.to(down.dtype)
        if self.positions is None:
            return low_rank_mixed(x, down, up, weights)
        down, up = (stored.unflatten(2, (self.heads, -1)) for stored in (down, up))
        inner = torch.einsum("thi,srhi->thsr", x.unflatten(1, (self.heads, -1)), down)
        hidden = torch.einsum("thsr,ths->tr", inner, weights)
        return torch.einsum("tr,ths,srho->tho", hidden, weights, up).flatten(1)

    def contribution(
        self, weights: Float[Tensor, "choices *positions experts"]
    ) -> Float[Tensor, "choices orders experts experts"]:
        """The part of an expert is what it adds to all heads together."""
        by_head = weights.double().view(len(weights), self.heads, self.num_experts)
        return update_products(self._grams(self.down, by_head), self._grams(self.up, by_head))[:, None]

    def _grams(self, stored: Tensor, weights: Tensor) -> Tensor:
        blocks = stored.detach().double().unflatten(2, (self.heads, -1))
        grams = torch.einsum("sjhd,pkhd->hspjk", blocks, blocks)
        return torch.einsum("chs,chp,hspjk->cspjk", weights, weights, grams)
