"""Small byte-level language models, trained once and kept, and the text they read: what PEER's benchmarks share."""

import time
from collections.abc import Callable, Iterator
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CONTEXT = 128
WIDTH = 128
RELU, SWIGLU = "ReLU", "SwiGLU"


def text(path: Path, first: float = 0.0, last: float = 1.0) -> Tensor:
    """The bytes of a file from one share of its length to another."""
    data = path.read_bytes()
    return torch.frombuffer(bytearray(data[int(first * len(data)) : int(last * len(data))]), dtype=torch.uint8)


def wikitext(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes to train on, to choose on, and held out, of WikiText-2's two small files."""
    valid, test = folder / "wikitext2" / "valid.txt", folder / "wikitext2" / "test.txt"
    return torch.cat([text(test), text(valid, 0.0, 0.8)]), text(valid, 0.8, 0.9), text(valid, 0.9)


def plays(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The same of tinyshakespeare."""
    path = folder / "tinyshakespeare" / "input.txt"
    return text(path, 0.0, 0.9), text(path, 0.9, 0.95), text(path, 0.95)


def batches(data: Tensor, rows: int, seed: int, context: int = CONTEXT) -> Iterator[Tensor]:
    """Windows at random places, `(rows, context + 1)`, without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - context - 1, (rows,), generator=draw)
        yield torch.stack([data[at : at + context + 1] for at in starts.tolist()]).long()


def windows(data: Tensor, count: int, context: int = CONTEXT, rows: int = 16) -> list[Tensor]:
    """`count` windows spread evenly over a text, in batches."""
    starts = torch.linspace(0, len(data) - context - 2, count).long().tolist()
    return list(torch.stack([data[at : at + context + 1] for at in starts]).long().split(rows))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    """Mean nats per byte."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, data: list[Tensor]) -> float:
    """Mean nats per byte over batches, in eval mode."""
    before = model.training
    model.eval()
    losses = [(float(loss_of(model, batch)), len(batch)) for batch in data]
    model.train(before)
    return sum(loss * rows for loss, rows in losses) / sum(rows for _, rows in losses)


def build(kind: str, seed: int, layers: int = 4, width: int = WIDTH, hidden: int | None = None) -> nn.Module:
    """A fresh model: GPT-NeoX with ReLU and biases, or Llama with SwiGLU."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 256, "hidden_size": width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": 2 * CONTEXT, "tie_word_embeddings": False}
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == RELU:
        form = {"intermediate_size": hidden or 4 * width, "hidden_act": "relu", "use_parallel_residual": False}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **ids, **form)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, **ids, intermediate_size=hidden or 3 * width)).eval()


def feed_forward_paths(model: nn.Module) -> list[str]:
    """The feed-forward layers, first block first."""
    return [path for path, _ in model.named_modules() if path.endswith(".mlp")]


def train(
    model: nn.Module, draw: Iterator[Tensor], steps: int, loss: Callable[[Any, Tensor], Tensor] = loss_of
) -> None:
    """Muon for the matrices inside the blocks, AdamW for the rest; warm-up, then a cosine to a fiftieth."""
    inside = [p for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and (p.dim() != 2 or "embed" in n)]
    optimisers = [torch.optim.Muon(inside, lr=0.02, weight_decay=0.0), torch.optim.AdamW(rest, lr=3e-3)]
    full = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    model.train()
    for step in range(steps):
        share = min(1.0, (step + 1) / 30) * (0.02 + 0.49 * (1 + cos(pi * step / steps)))
        for optimiser, rate in zip(optimisers, full, strict=True):
            optimiser.param_groups[0]["lr"] = rate * share
        found = loss(model, next(draw))
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 100 == 0:
            print(f"  step {step}: {float(found.detach()):.3f} nats per byte", flush=True)
    model.eval()


def kept(path: Path, model: nn.Module, learn: Callable[[], None]) -> nn.Module:
    """`model` with the weights stored at `path`; where there are none it learns, and they are stored."""
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    started = time.process_time()
    learn()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)
    print(f"trained {path.stem} in {time.process_time() - started:.0f} s of processor time", flush=True)
    return model


def dense(kind: str, folder: Path, cache: Path, steps: int, seed: int = 0) -> nn.Module:
    """A model trained on WikiText-2's bytes."""
    model = build(kind, seed)
    draw = batches(wikitext(folder)[0], 16, seed + 1)
    return kept(cache / f"{kind}-{steps}-{seed}.safetensors", model, lambda: train(model, draw, steps))
