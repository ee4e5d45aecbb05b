"""Stage align from kept activations against running the frozen components in each step, alternating, same projectors.

`python -m benchmarks.hybrid_align` writes `results/hybrid_align.json`. One block, output projectors only: the form in
which nothing that a component reads changes. A GPT-NeoX and a Mamba-2 with random weights, which cost what trained ones
do; processor time of the whole stage, filling the store included.
"""

import argparse
import time
from typing import Any

import torch

from benchmarks.timing import machine, show, summary, write
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches, make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.manticore.aligning import align_groups
from mixwright.methods.manticore.cached_align import CachedAlign, Store, tokens_of
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import Stage

PLAIN, KEPT = "components in each step", "kept activations"
_TEXT = "the quick brown fox jumps over a lazy dog while seven wizards box five quacking zebras"
WORDS = tuple(_TEXT.split(" "))


def hybrid(width: int, layers: int) -> HybridModel:
    """The pair of one width, Mamba-2 twice as deep."""
    neox = tiny_backbone("gpt_neox", hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers)
    heads = {"num_heads": 2 * width // 32, "head_dim": 32, "state_size": 16, "chunk_size": 32}
    mamba = tiny_backbone("mamba2", hidden_size=width, num_hidden_layers=2 * layers, **heads)
    return compose(ManticoreConfig(projectors="identity", align="output"), [neox, mamba])


def texts(rows: int, length: int, batch: int) -> Batches:
    """Plain text, packed."""
    words = [WORDS[(7 * n + n // 5) % len(WORDS)] for n in range(rows * length // 5)]
    task = TextTask("t", "text", (Example(" ".join(words)),))
    return make_batches(task, byte_tokenizer(), "causal", batch_size=batch, seed=0, max_length=length)


def stage_of(model: HybridModel, data: Batches, steps: int, *, kept: bool) -> dict[str, torch.Tensor]:
    """The whole stage from the same start, filling the store included; the projectors in the end."""
    start = {name: tensor.clone() for name, tensor in model.added_state().items()}
    objective: Any = supervised
    if kept:
        store = Store(dict(enumerate(model.backbone.widths)), tokens_of([data]), torch.float32)
        objective = CachedAlign(model, [data], store)
    groups = align_groups(model, ManticoreConfig(align="output"))
    stage = Stage(name="align", groups=groups, steps=steps, warmup=0.0, cooldown=1.0, objective=objective)
    fit(model, stage, data, config=TrainConfig(batch_size=data.batch_size), seed=0)
    found = {name: tensor.clone() for name, tensor in model.added_state().items()}
    with torch.no_grad():
        for name, tensor in model.added_state().items():
            tensor.copy_(start[name])
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    for name, value in (("width", 128), ("layers", 3), ("rows", 32), ("length", 64), ("batch", 8), ("epochs", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=3)
    asked, began = parser.parse_args(), time.process_time()
    torch.set_num_threads(1)
    model, data = hybrid(asked.width, asked.layers), texts(asked.rows, asked.length, asked.batch)
    steps = asked.epochs * len(data) // asked.batch
    ends = {kept: stage_of(model, data, steps, kept=kept) for kept in (True, False)}
    gap = max(float((ends[True][n].float() - t.float()).abs().max()) for n, t in ends[False].items())
    seconds: dict[str, list[float]] = {PLAIN: [], KEPT: []}
    for _ in range(asked.rounds):
        for name in (PLAIN, KEPT):
            started = time.process_time()
            stage_of(model, data, steps, kept=name == KEPT)
            seconds[name].append(time.process_time() - started)
    result = summary(seconds, PLAIN)
    show(f"stage align, {steps} steps, {asked.epochs} epochs, width {asked.width}", result)
    print(f"largest difference of final projectors: {gap:.2g}")
    settings = {**vars(asked), "steps": steps}
    write("hybrid_align", {**machine(began), "settings": settings, "largest_difference": gap, "stage": result})


if __name__ == "__main__":
    main()
