"""Objectives: (model, batch) -> the loss summed over the targets that count, in float32.

Where a batch says which task each row is of, the model hears it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixwright.data.collate import IGNORED, Batch
from mixwright.ops.mean_pool import sentence_embedding
from mixwright.routing import Condition

TEMPERATURE = 0.05


def supervised(model: Any, batch: Batch) -> Tensor:
    """The objective that a batch was made for: next token, target text, or nearest label text."""
    objectives = {"causal": causal_lm, "seq2seq": seq2seq, "encoder": label_matching}
    return objectives[batch.kind](model, batch)


def causal_lm(model: Any, batch: Batch) -> Tensor:
    """- sum_t log p(target_t | inputs up to t) over the targets that count."""
    with of_tasks(model, batch.task_ids):
        logits = model(**batch.inputs, use_cache=False).logits
    return _token_loss(logits, batch.targets)


def seq2seq(model: Any, batch: Batch) -> Tensor:
    """- sum_t log p(target_t | source, targets before t): teacher forcing."""
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
    with of_tasks(model, batch.task_ids):
        logits = model(
            **batch.inputs,
            decoder_input_ids=decoder_inputs,
            decoder_attention_mask=(batch.targets != IGNORED).long(),
            use_cache=False,
        ).logits
    return _token_loss(logits, batch.targets)


def label_matching(model: Any, batch: Batch) -> Tensor:
    """- sum_i log softmax_l(cos(text_i, label_l) / 0.05)[target_i], with mean-pooled embeddings by the same model.

    The in-context form of a sentence encoder's contrastive loss (Reimers & Gurevych 2019; van den Oord et al. 2018),
    whose negatives are the other labels' texts.
    """
    if batch.label_inputs is None:
        raise ValueError("label matching needs batch.label_inputs, the texts of the labels.")
    with of_tasks(model, batch.label_task_ids):
        labels = embed(model, batch.label_inputs)
    with of_tasks(model, batch.task_ids):
        texts = embed(model, batch.inputs)
    with torch.autocast(texts.device.type, enabled=False):
        scores = texts @ labels.T / TEMPERATURE
        if batch.task_ids is not None and batch.label_task_ids is not None:
            scores = scores.masked_fill(batch.task_ids[:, None] != batch.label_task_ids, -torch.inf)
        return cross_entropy(scores, batch.targets, reduction="sum")


def embed(model: Any, inputs: Any) -> Tensor:
    """The mean of the last hidden state over real tokens, of length 1: `(batch, width)`, float32."""
    hidden = model(**inputs).last_hidden_state
    with torch.autocast(hidden.device.type, enabled=False):
        return sentence_embedding(hidden, inputs["attention_mask"])


def of_tasks(model: Any, task_ids: Tensor | None) -> AbstractContextManager[Any]:
    """Inside the block the passes of a composed model are of these tasks; without ids, of whatever was said before."""
    return nullcontext() if task_ids is None else model.under(Condition(task_ids=task_ids))


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
