"""Hybrids at a tiny size, with weights of any shape: untrained components, texts of bytes."""

from typing import Any

import torch

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.model import ComposedModel
from mixwright.data.tasks import task_of
from mixwright.evaluation.hybrid_documents import Documents, documents_of
from mixwright.methods.base import load

NAMES = ("neox", "llama", "gpt")
FAMILIES = ("gpt_neox", "llama", "gpt2")
TEXTS = ("A first text.", "short", "A third one, the longest by far.")


def hybrid_model(models: int = 2, blocks: int = 2, rows: Any = None, **config: Any) -> ComposedModel:
    """Components of different architectures with random weights; `rows` of mixture weights, or uniform ones."""
    card = load("manticore")
    backbones = [tiny_backbone(family, seed=seed) for seed, family in enumerate(FAMILIES[:models])]
    settings = card.config(num_blocks=blocks, names=NAMES[:models], mixture_weights=rows, **config)
    model = card.compose(settings, backbones)
    with torch.no_grad():  # untrained heads all but agree; larger logits make who acts visible
        for component in model.backbone.components:
            component.get_output_embeddings().weight.mul_(20)
    return model


def documents(texts: tuple[str, ...] = TEXTS, batch_size: int = 8, max_length: int = 20) -> Documents:
    tasks = [task_of([{"text": text} for text in texts], name="plain")]
    tasks.append(task_of([{"prompt": "Say:", "completion": text} for text in texts[:2]], name="asked"))
    return documents_of(tasks, byte_tokenizer("causal"), batch_size=batch_size, max_length=max_length)
