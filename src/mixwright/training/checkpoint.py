"""Checkpoints: folders that appear whole or not at all, two are kept, and each says which run it belongs to.

A checkpoint is tensors as safetensors and `state.json` with the step, what identifies the run, and the SHA-256 of every
file beside it. Nothing in it is executed when it is read. There is no random state in it, and no place in the data:
both are functions of the seed and the step.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from mixwright.files import publish_folder, room_for, sha256_file

KEPT = 2
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Where a run stands after `step` steps. `tensors`: file name -> tensors by name; `values`: plain data."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Checkpoints:
    """The checkpoints of one stage of one run, in `folder`; `identity` is all that the resulting weights depend on."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = dict(identity)

    def save(self, snapshot: Snapshot) -> Path:
        """Publish a snapshot, then let go of all but the last two. A failure leaves the earlier ones as they were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"step-{snapshot.step:08d}"
        staging = self.folder / f".{final.name}.{os.getpid()}"
        for left_over in self.folder.glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(left_over)
        try:
            self._write(staging, snapshot)
            if final.exists():
                shutil.rmtree(final)
            publish_folder(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for old in self.steps()[KEPT:]:
            shutil.rmtree(old)
        return final

    def steps(self) -> list[Path]:
        """Published checkpoints, the latest first."""
        return sorted(self.folder.glob("step-*"), reverse=True)

    def latest(self, *, force: bool = False) -> Snapshot | None:
        """The latest checkpoint that is whole, or None if there is none.

        Raises ValueError when it belongs to a different run (each difference is named), unless `force`, and when there
        are checkpoints but every one of them is damaged.
        """
        damaged: list[str] = []
        for folder in self.steps():
            try:
                state = self._verified(folder)
            except (OSError, ValueError, KeyError) as error:
                damaged.append(f"{folder.name}: {error}")
                continue
            if not force:
                self._refuse_other_run(state["identity"], folder)
            tensors = {name: load((folder / name).read_bytes()) for name in state["files"]}
            return Snapshot(step=state["step"], tensors=tensors, values=state["values"])
        if damaged:
            raise ValueError(f"{self.folder}: no checkpoint is whole ({'; '.join(damaged)}). Start over with force.")
        return None

    def clear(self) -> None:
        """Forget every checkpoint of this stage."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, staging: Path, snapshot: Snapshot) -> None:
        staging.mkdir()
        files: dict[str, str] = {}
        for name, tensors in snapshot.tensors.items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            with room_for(staging, len(data)):
                (staging / name).write_bytes(data)
            files[name] = sha256_file(staging / name)
        state = {"step": snapshot.step, "identity": self.identity, "files": files, "values": dict(snapshot.values)}
        with room_for(staging, 4096):
            (staging / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _verified(self, folder: Path) -> dict[str, Any]:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        for name, digest in state["files"].items():
            if Path(name).name != name or sha256_file(folder / name) != digest:
                raise ValueError(f"{name} is not the file that was saved")
        return state

    def _refuse_other_run(self, theirs: Mapping[str, str], folder: Path) -> None:
        keys = sorted({*theirs, *self.identity})
        changes = [
            f"{key} was {theirs.get(key, 'absent')}, now {self.identity.get(key, 'absent')}"
            for key in keys
            if theirs.get(key) != self.identity.get(key)
        ]
        if changes:
            raise ValueError(
                f"{folder} belongs to a different run: {'; '.join(changes)}. Put it back, take another output_dir, "
                "or continue in spite of it with force."
            )
