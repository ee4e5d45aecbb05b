"""Sentence embeddings from any encoder."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mixwright.ops.mean_pool import sentence_embedding


def embed(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
    """Mean-pooled, normalised last states of an encoder for inputs with an `attention_mask`."""
    return sentence_embedding(model(**inputs).last_hidden_state, inputs["attention_mask"])
