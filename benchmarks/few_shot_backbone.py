"""The benchmark's backbone: a small ViT that learns to tell logographs apart, none of which is in an episode's domain.

python -m benchmarks.few_shot --pretrain --out DIR   (about five minutes of one core)

Tangut, Yi, cuneiform and hieroglyphs, one face each, warped and degraded at random; classes join over the first quarter
of the steps, for with all from the start nothing is learned for long. What is saved is an ordinary transformers folder,
without the head.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

from benchmarks.few_shot_glyphs import SIDE, Pictures, degraded

MEAN, DEVIATION = 0.25, 0.35


@dataclass(frozen=True)
class Pretraining:
    """Sizes and length of the pretraining."""

    width: int = 64
    layers: int = 4
    patch: int = 7
    steps: int = 5000
    batch: int = 96
    rate: float = 2e-3
    first_classes: int = 300
    deviation: float = 0.1


def pixels(images: Tensor) -> Tensor:
    """uint8 (n, 28, 28) or [0, 1] floats -> what the ViT reads (n, 1, 28, 28)."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    return ((values - MEAN) / DEVIATION)[:, None]


def empty_vit(size: Pretraining) -> ViTModel:
    """A ViT with random weights."""
    config = ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        intermediate_size=2 * size.width,
        image_size=SIDE,
        patch_size=size.patch,
        num_channels=1,
    )
    model = ViTModel(config, add_pooling_layer=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=size.deviation)
    return model


def batches(corpus: Pictures, size: Pretraining, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels, classes) for each step; one image for each class, so its row is its class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(corpus.images), generator=generator)
    for step in range(size.steps):
        joined = int(size.first_classes + 4 * step / size.steps * (len(order) - size.first_classes))
        rows = order[torch.randint(max(2, min(joined, len(order))), (size.batch,), generator=generator)]
        yield pixels(degraded(corpus.images[rows], generator)), corpus.labels[rows]


def pretrain(out: Path, corpus: Pictures, size: Pretraining = Pretraining(), seed: int = 0) -> dict[str, float]:
    """Train a ViT on the corpus and save it; the accuracy of the last batches, and processor seconds."""
    torch.manual_seed(seed)
    model, started = empty_vit(size), time.process_time()
    head = nn.Parameter(0.05 * torch.randn(corpus.num_classes, size.width))
    optimiser = torch.optim.AdamW([*model.parameters(), head], lr=size.rate, weight_decay=0.02)
    warm = max(1, size.steps // 20)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min(1.0, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * t / size.steps))
    )
    right: list[float] = []
    for step, (images, classes) in enumerate(batches(corpus, size, seed)):
        features = model(pixel_values=images).last_hidden_state[:, 0]
        logits = features @ head.T
        optimiser.zero_grad()
        cross_entropy(logits, classes).backward()
        optimiser.step()
        decay.step()
        right.append((logits.argmax(1) == classes).float().mean().item())
        if step % 250 == 249:
            print(f"step {step + 1}: accuracy {sum(right[-250:]) / 250:.3f}", flush=True)
    model.save_pretrained(out)
    last = right[-250:]
    return {"accuracy": sum(last) / len(last), "cpu_seconds": time.process_time() - started}
