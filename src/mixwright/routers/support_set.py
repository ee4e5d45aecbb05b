"""The router of an episode: from the labelled examples alone, how much each expert counts."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from mixwright.ops.prototypes import class_means
from mixwright.routers.base import AbstractRouter
from mixwright.routing import Condition, Routing


class SpectralLinear(nn.Module):
    """y = (W / sigma(W)) x + b, sigma the largest singular value (Miyato et al. 2018).

    sigma is followed by one step of the power iteration in each training pass; its vectors `left` and `right` are
    buffers of this module, so that they lie in every checkpoint.
    """

    def __init__(self, d_in: int, d_out: int, draw: torch.Generator | None) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight = nn.Parameter(torch.empty(d_out, d_in).uniform_(-bound, bound, generator=draw))
        self.bias = nn.Parameter(torch.empty(d_out).uniform_(-bound, bound, generator=draw))
        right = torch.randn(d_in, generator=draw)
        self.register_buffer("right", right / right.norm())
        self.register_buffer("left", torch.zeros(d_out))
        self.right: Tensor
        self.left: Tensor
        for _ in range(15):
            self._follow()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`x` through the normalised weight."""
        if self.training:
            self._follow()
        sigma = self.left.clone() @ (self.weight @ self.right.clone())
        return nn.functional.linear(x, self.weight / sigma, self.bias)

    @torch.no_grad()
    def _follow(self) -> None:
        left = self.weight @ self.right
        self.left.copy_(left / left.norm().clamp_min(1e-12))
        right = self.weight.T @ self.left
        self.right.copy_(right / right.norm().clamp_min(1e-12))


class SupportSetRouter(AbstractRouter):
    """alpha = s / sum(s), s = sigmoid(<key_m, h> / T), h read from class prototypes by one transformer block.

    Chen et al. 2024 (SMAT, arXiv 2403.08477), section 3; the sheet of the method names what differs from the released
    code: h is the mean of the latent tokens, not the first class's token, so that neither the order of the classes nor
    that of the examples matters. In training s is a relaxed Bernoulli draw at temperature T.

    `progress` is the share of training that is done, from which T falls: max(0.5, 5 - 12.5 progress). `allowed` are
    the experts that may act. Everything is float32 whatever the features are. `num_blocks`: with more than none, a
    mixture for each block of the backbone, by keys of its own (experts, blocks, width).
    """

    NUM_TOKENS = 4

    def __init__(self, width: int, num_experts: int, seed: int = 0, num_blocks: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.num_experts = num_experts
        self.heads = math.gcd(4, width)
        self._progress = 1.0
        shape = (num_experts, num_blocks, width) if num_blocks else (num_experts, width)
        self.keys = nn.Parameter(torch.randn(shape, generator=draw) * math.sqrt(2 / width))
        self.tokens = nn.Parameter(torch.randn(self.NUM_TOKENS, width, generator=draw) * 1e-3)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.qkv = SpectralLinear(width, 3 * width, draw)
        self.out = SpectralLinear(width, width, draw)
        self.up = SpectralLinear(width, 2 * width, draw)
        self.down = SpectralLinear(2 * width, width, draw)
        self.register_buffer("allowed", torch.ones(num_experts, dtype=torch.bool))
        self.register_buffer("temperature", torch.tensor(5.0))
        self.allowed: Tensor
        self.temperature: Tensor

    @property
    def progress(self) -> float:
        """The share of training that is done, as far as is known; of a trained router that was loaded, 1."""
        return self._progress

    @progress.setter
    def progress(self, share: float) -> None:
        self._progress = share
        self.temperature.fill_(max(0.5, 5.0 - 12.5 * share))

    def forward(self, x: Float[Tensor, "shots width"], condition: Condition) -> Routing:
        """One choice for the whole episode, or for each block; `x` are frozen features of `condition.support`."""
        assert condition.support is not None
        return self.routing(self.logits(x, condition.support.labels))

    def task_embedding(
        self, features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"]
    ) -> Float[Tensor, " width"]:
        """h: what the latent tokens read from the class prototypes."""
        classes = int(labels.max()) + 1
        prototypes = class_means(features.to(self.keys.dtype), labels, classes)
        x = torch.cat([prototypes, self.tokens])
        x = x + self.out(self._attended(self.qkv(self.norm_attention(x))))
        x = x + self.down(gelu(self.up(self.norm_mlp(x))))
        return x[classes:].mean(0)

    def logits(
        self, features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"]
    ) -> Float[Tensor, " *blocks experts"]:
        """<key_m, h> for each expert, before any temperature."""
        return (self.keys @ self.task_embedding(features, labels)).movedim(0, -1)

    def routing(self, logits: Float[Tensor, " *blocks experts"]) -> Routing:
        """The gates' shares; drawn in training."""
        if self.training:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits + uniform.log() - (-uniform).log1p()
        gates = torch.sigmoid(logits / self.temperature) * self.allowed
        return Routing(gates / gates.sum(-1, keepdim=True).clamp_min(1e-20), self.num_experts)

    def _attended(self, qkv: Float[Tensor, "tokens wide"]) -> Float[Tensor, "tokens width"]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in qkv.chunk(3, -1))
        return scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
