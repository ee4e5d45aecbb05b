"""Sentence embeddings from token states."""

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def mean_pool(
    states: Float[Tensor, "batch seq width"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch width"]:
    """The mean over the tokens where `mask` is true; a row without any is zero."""
    kept = mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp_min(1.0)


def sentence_embedding(
    states: Float[Tensor, "batch seq width"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch width"]:
    """The mean state over real tokens, of length 1, in float32."""
    return normalize(mean_pool(states.float(), mask), dim=-1)
