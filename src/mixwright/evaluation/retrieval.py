"""Retrieval: the expert whose training example lies nearest to the input, by an embedding of whole texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import IGNORED, Batch
from mixwright.ops.mean_pool import mean_pool

Embedding = Callable[[ComposedModel, Batch], Float[Tensor, "batch width"]]
"""A text's embedding, of length 1; it must not look at the target."""


@dataclass(frozen=True)
class Library:
    """Embedded training examples of all experts: `rows` (examples, width) and the pool id `owner` of each."""

    rows: Float[Tensor, "examples width"]
    owner: Int[Tensor, " examples"]
    embedding: Embedding


def build_library(model: ComposedModel, examples: Sequence[Sequence[Batch]], embedding: Embedding) -> Library:
    """From batches of training examples of each expert, in the order of the pool."""
    with eval_mode(model):
        each = [torch.cat([embedding(model, batch) for batch in batches]) for batches in examples]
    owner = torch.cat([torch.full((len(rows),), at, device=rows.device) for at, rows in enumerate(each)])
    return Library(torch.cat(each), owner, embedding)


def nearest_expert(model: ComposedModel, library: Library, batch: Batch) -> Int[Tensor, " batch"]:
    """The owner of the nearest training example by cosine, for each row; the first of equals."""
    with eval_mode(model):
        texts = library.embedding(model, batch)
    return library.owner[torch.einsum("bw,ew->be", texts, library.rows).argmax(-1)]


def mean_state(model: ComposedModel, batch: Batch) -> Float[Tensor, "batch width"]:
    """The backbone's own last hidden state, averaged over the tokens of the input, of length 1.

    Of a decoder: over the prompt alone, the tokens before the first target; of an encoder-decoder: the encoder's.
    """
    with model.disabled():
        if batch.kind == "seq2seq":
            encoder: nn.Module = model.get_encoder()
            states = encoder(**batch.inputs).last_hidden_state
        elif batch.kind == "causal":
            states = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
        else:
            states = model(**batch.inputs).last_hidden_state
    return normalize(mean_pool(states.float(), prompt_mask(batch)), dim=-1)


def prompt_mask(batch: Batch) -> Tensor:
    """The tokens that are input and not target; all of a packed text, which has no prompt."""
    mask = batch.inputs["attention_mask"].bool()
    if batch.kind != "causal":
        return mask
    # target t is token t + 1, so the last token of a prompt is the first that has a target
    before = (batch.targets != IGNORED).long().cumsum(-1) - (batch.targets != IGNORED).long() == 0
    prompt = mask & before
    return torch.where(prompt.sum(-1, keepdim=True) > 1, prompt, mask)
