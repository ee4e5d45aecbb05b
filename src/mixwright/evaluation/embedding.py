"""Sentence embeddings from any encoder: the mean of its last states over real tokens, normalised."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


def mean_pool(
    states: Float[Tensor, "batch seq width"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch width"]:
    """The mean over the tokens where `mask` is true; a row without any is zero."""
    kept = mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp_min(1.0)


def embed(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
    """Mean-pooled, normalised last states of an encoder for inputs with an `attention_mask`."""
    states = model(**inputs).last_hidden_state.float()
    return normalize(mean_pool(states, inputs["attention_mask"]), dim=-1)
