"""Run as a script: meta-tune in children that are killed with SIGKILL at random moments, resume them, compare the end.

`python kill_harness.py FOLDER KILLS` prints how often a run was killed, and which tensors then differ from those of a
run that nobody touched.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches
from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.order import Order
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import compose
from mixwright.methods.smat.recipe import groups, stages
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit

STEPS = 6
CONFIG = SmatConfig(experts=3, steps=STEPS, learning_rate=0.05, mask_learning_rate=1e-6, distilled=0.5, frozen_cache=40)


def domain() -> Domain:
    draw = torch.Generator().manual_seed(0)
    shapes = torch.randn(6, 1, 3, 16, 16, generator=draw)
    images = (shapes + 0.8 * torch.randn(6, 6, 3, 16, 16, generator=draw)).flatten(0, 1)
    return Domain("waves", images, [label for label in range(6) for _ in range(6)], tuple("abcdef"))


def train(folder: Path) -> None:
    source = FixedEpisodes(domains=(domain(),), ways=3, shots=2, queries=2)
    batches = Batches(
        range(100), lambda rows: source.episode(rows[0]), batch_size=1, seed=0, order=Order(100, 0), digest="waves"
    )
    model = compose(CONFIG, [tiny_backbone("vit", hidden_dropout_prob=0.1)])
    (stage, *_) = stages(CONFIG)
    stage = replace(stage, groups=groups(CONFIG, model))
    fit(model, stage, batches, config=TrainConfig(checkpoint_every=1, accumulate=2), folder=folder, resume=True)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.added_state().items()}
    save_file(state, folder / "end.safetensors")


def child(folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(folder)
    except BaseException:
        os._exit(1)
    os._exit(0)


def main(folder: Path, kills: int) -> None:
    draw = random.Random(0)
    train(folder / "undisturbed")  # here, so that children start with everything imported
    expected = load_file(folder / "undisturbed" / "end.safetensors")
    multipliers = expected["backbone.experts.multipliers"]
    killed, run = 0, folder / "killed"
    while not (run / "end.safetensors").exists():
        pid = child(run)
        if killed < kills:
            reached = run / "checkpoints" / f"step-{killed + 1:08d}"
            while not reached.exists():  # it is alive, or the test runs into its time limit
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    found = load_file(run / "end.safetensors")
    unequal = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    moved = bool((multipliers > 0).any())
    print(json.dumps({"killed": killed, "unequal": unequal, "tensors": len(found), "moved": moved}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
