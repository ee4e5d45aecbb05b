"""The processes of a run: one, or those that torchrun started."""

import torch
from accelerate import Accelerator, PartialState


def process_state() -> PartialState:
    """Which process this is, and how many there are; on a machine without an accelerator they talk through gloo."""
    return PartialState(cpu=not torch.accelerator.is_available())


def make_accelerator(tracker: str | None, folder: str | None) -> Accelerator:
    """Device, processes and trackers. Precision is the loop's own: accelerate keeps one for a whole program."""
    process_state()
    return Accelerator(cpu=not torch.accelerator.is_available(), log_with=tracker, project_dir=folder)
