"""Sentence embeddings from any encoder: the mean of its last states over real tokens, normalised."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize


def mean_pool(
    states: Float[Tensor, "batch seq width"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch width"]:
    """The mean over the tokens where `mask` is true; a row without any is zero."""
    kept = mask.unsqueeze(-1).to(states.dtype)
    return (states * kept).sum(1) / kept.sum(1).clamp_min(1.0)


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
    """Mean-pooled, normalised last states of an encoder for `input_ids` and `attention_mask`."""
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return normalize(mean_pool(states, batch["attention_mask"]), dim=-1)


def nearest(
    texts: Float[Tensor, "batch width"], labels: Float[Tensor, "classes width"]
) -> Int[Tensor, " batch"]:
    """The label of the largest cosine; the first on a tie. Both sides are normalised already."""
    return torch.einsum("bw,cw->bc", texts, labels).argmax(-1)
