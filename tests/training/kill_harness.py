"""Run as a script: train in children that are killed with SIGKILL at random moments, resume them, and compare the end.

`python kill_harness.py FOLDER KILLS` prints one JSON line for the sound writer and one for its naive twin: runs,
kills, failed resumes, unequal ends. The naive twin writes its checkpoint over the last one, file after file, as many
loops do. The disk is made slow for both, so that kills fall into writing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.recipe import stages
from mixwright.recipe import TrainConfig
from mixwright.training import checkpoint
from mixwright.training.fit import fit

STEPS = 10


def naive_save(self: checkpoint.Checkpoints, snapshot: checkpoint.Snapshot) -> Path:
    folder = self.folder / "step-00000000"
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": snapshot.step, "identity": self.identity, "values": snapshot.values}
    state["files"] = dict.fromkeys(snapshot.tensors, "")
    (folder / "state.json").write_text(json.dumps(state))
    for name, tensors in snapshot.tensors.items():
        with (folder / name).open("wb") as file:
            file.write(checkpoint.save({key: tensor.detach() for key, tensor in tensors.items()}))
    return folder


def naive_verified(self: checkpoint.Checkpoints, folder: Path) -> dict:
    del self
    return json.loads((folder / "state.json").read_text())


def slow_save(tensors: dict) -> bytes:
    time.sleep(0.01)
    return save(tensors)


def train(folder: Path) -> None:
    config = PhatgooseConfig(rank=4, alpha=4.0, expert_steps=STEPS)
    stage = stages(config)[0]
    task = TextTask("t", "prompt", tuple(Example(f"{c}:", target=c * 3) for c in "abcdefgh"))
    batches = make_batches(task, byte_tokenizer(), "causal", batch_size=2, seed=0, max_length=16)
    model = stage.build(tiny_backbone("llama", attention_dropout=0.1), 0, None)
    settings = TrainConfig(checkpoint_every=1)
    fit(model, stage, batches, config=settings, folder=folder, resume=True)
    result = stage.harvest(model).factors
    data = b"".join(tensor.numpy().tobytes() for down, up, _ in result.values() for tensor in (down, up))
    (folder / "end.bin").write_bytes(data)


def child(folder: Path) -> int:
    """Train in a child process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(folder)
    except BaseException:
        os._exit(1)
    os._exit(0)


def finished(pid: int, after: float | None) -> int | None:
    """The exit code of a child, or None if it was killed `after` seconds."""
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(folder: Path, kills: int) -> None:
    draw = random.Random(0)
    folder.mkdir(parents=True)
    train(folder / "undisturbed")  # here, so that children start with everything imported
    expected = (folder / "undisturbed" / "end.bin").read_bytes()
    began = time.monotonic()
    assert finished(child(folder / "timed"), None) == 0
    length = time.monotonic() - began
    assert (folder / "timed" / "end.bin").read_bytes() == expected
    counts = {"runs": 0, "kills": 0, "failed": 0, "unequal": 0}
    while counts["kills"] < kills:
        run = folder / f"run-{counts['runs']}"
        counts["runs"] += 1
        code = None
        while code is None:
            last = counts["kills"] >= kills
            code = finished(child(run), None if last else draw.uniform(0.05, 0.8) * length)
            counts["kills"] += code is None
        if code != 0:
            counts["failed"] += 1
        elif (run / "end.bin").read_bytes() != expected:
            counts["unequal"] += 1
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoint.save = slow_save
    main(Path(sys.argv[1]) / "sound", int(sys.argv[2]))
    checkpoint.Checkpoints.save, checkpoint.Checkpoints._verified = naive_save, naive_verified
    main(Path(sys.argv[1]) / "naive", int(sys.argv[2]))
