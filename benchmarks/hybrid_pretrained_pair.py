"""The pretrained pair: a GPT-NeoX and a Mamba-2 of a million parameters, one tokenizer, trained here from nothing.

They are small because they must be rebuilt by one command, on one core of a CPU: four layers of attention, six of
Mamba-2 whose head and state sizes are those that transformers' plain scan is quick at, with a chunk that divides the
training length (the default of 256 pads each sequence to four times its length).
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hybrid_pretrained_texts import GENERAL, LENGTH, VOCABULARY, Batches, Texts, documents, parts
from mixwright.backbones.hf import bpe_tokenizer, build_backbone, load_backbone, load_tokenizer, without_bars

NAMES = ("neox", "mamba2")
STEPS, RATE, DECAY = 3000, 3e-3, 0.1
_EVERY = 100
_ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": (
        "gpt_neox",
        {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 1024,
            **_ENDS,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 128,
            "num_hidden_layers": 6,
            "state_size": 16,
            "expand": 2,
            "head_dim": 64,
            "num_heads": 4,
            "n_groups": 1,
            "chunk_size": 32,
            **_ENDS,
        },
    ),
}
_CARD = """---
license: apache-2.0
language: en
---
{kind} of {size:.2f} M parameters, trained from random weights by `python -m benchmarks.hybrid_pretrained --pretrain`
for {steps} steps of {tokens} tokens on four fifths of WikiText-2 (articles of Wikipedia, CC BY-SA). Loss {loss:.4f}
nats per token on articles it has not seen. For measuring hybrids; of no other use.
"""


def random_model(name: str, seed: int = 0) -> nn.Module:
    """A component of the pair before training."""
    model_type, settings = _SETTINGS[name]
    return build_backbone(model_type, {**settings, "vocab_size": VOCABULARY}, kind="causal", seed=seed)


def present(out: Path) -> bool:
    """Whether both folders are complete."""
    return all((out / name / "model.safetensors").is_file() for name in NAMES)


def load_pair(out: Path) -> dict[str, nn.Module]:
    """The two components, by name."""
    with without_bars():
        return {name: load_backbone(out / name, kind="causal") for name in NAMES}


def tokenizer_of(out: Path) -> Any:
    """The tokenizer that lies in both folders."""
    return load_tokenizer(out / NAMES[0])


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats per token of the windows' every token but the first."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def pretrain(out: Path, data: Path, *, steps: int = STEPS) -> None:
    """Train what is not there yet; one that was cut off goes on where it last wrote its state."""
    torch.set_num_threads(1)
    split = parts(GENERAL, documents(GENERAL, data))
    tokenizer = bpe_tokenizer(split["train"], VOCABULARY)
    texts = Texts(data, tokenizer, (GENERAL,))
    stream = texts.parts[GENERAL]["train"].stream
    for name in NAMES:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.safetensors").is_file():
            continue
        model = _trained(name, folder, stream, steps)
        windows = torch.cat(texts.parts[GENERAL]["test"].windows(1000))
        with torch.no_grad():
            losses = [loss_of(model, piece).item() * len(piece) for piece in windows.split(64)]
        loss = sum(losses) / len(windows)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        kind = type(model).__name__
        text = _CARD.format(kind=kind, size=size, steps=steps, tokens=Batches(stream, 0).batch * LENGTH, loss=loss)
        (folder / "README.md").write_text(text, "utf-8")
        tokenizer.save_pretrained(str(folder))
        with without_bars():
            model.save_pretrained(str(folder))  # pyright: ignore[reportCallIssue] a transformers model
        (folder / "progress.pt").unlink(missing_ok=True)
        print(f"{name}: {size:.2f} M parameters, held-out loss {loss:.4f}", flush=True)


def _trained(name: str, folder: Path, stream: Tensor, steps: int) -> nn.Module:
    """AdamW with warm-up and a cosine; no decay on vectors."""
    model = random_model(name).train()
    flat = [p for p in model.parameters() if p.ndim < 2]
    wide = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": wide, "weight_decay": DECAY}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), fused=True)
    batches, first = Batches(stream, 1), 0
    state = folder / "progress.pt"
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    started = time.process_time()
    for step in range(first, steps):
        share = min((step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        loss = loss_of(model, batches(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _EVERY == 0:
            line = {"step": step + 1, "loss": round(loss.item(), 3), "cpu": round(time.process_time() - started)}
            print(name, json.dumps(line), flush=True)
            written = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(written, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    return model.eval()
