"""The demo's backbone: a causal language model of about a million parameters, trained on the spot with Muon."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mixwright.backbones.hf import bpe_tokenizer, build_backbone
from mixwright.data.batches import make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.demo.corpus import Domain
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.stage import ParamGroup, Stage

VOCABULARY = 1024
CONTEXT = 128
STEPS = 220
BATCH = 16
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def make_backbone(folder: Path, prose: Domain, domains: Sequence[Domain], *, steps: int, quiet: bool) -> float:
    """Train a backbone on `prose` and leave it in `folder` with its tokenizer; returns its last loss in nats per token.

    The tokenizer has seen a little of every domain, the model none.
    """
    sample = [*prose.train[:150], *(piece for domain in domains for piece in domain.train[:12])]
    tokenizer = bpe_tokenizer(sample, VOCABULARY)
    model = build_backbone("llama", _SHAPE, kind="causal")
    losses = _learn(model, tokenizer, prose, steps=steps, quiet=quiet)
    model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]  a transformers model
    tokenizer.save_pretrained(folder)
    return losses


def _learn(model: nn.Module, tokenizer: Any, prose: Domain, *, steps: int, quiet: bool) -> float:
    examples = tuple(Example(text=piece) for piece in prose.train)
    data = make_batches(
        TextTask(name=prose.name, format="text", examples=examples),
        tokenizer,
        "causal",
        batch_size=BATCH,
        seed=0,
        max_length=CONTEXT,
    )
    stage = Stage(
        name="backbone",
        groups=(
            ParamGroup(select=("*_proj.weight",), lr=0.01),
            ParamGroup(select=("*embed_tokens.weight", "*norm.weight", "*layernorm.weight"), lr=0.003),
        ),
        steps=steps,
        optimizer="muon",
        cooldown=0.5,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    fitted = fit(model, stage, data, config=TrainConfig(batch_size=BATCH), quiet=quiet)
    return fitted.loss or float("nan")
