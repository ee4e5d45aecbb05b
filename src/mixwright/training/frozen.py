"""Proof that what no group of a stage selects is the same afterwards, to the bit."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mixwright.ops.digest import digest_of_tensor
from mixwright.training.stage import Stage, select_parameters


def frozen_digests(model: nn.Module, stage: Stage) -> dict[str, str]:
    """The SHA-256 of every parameter that no group of the stage selects, by name."""
    learning = {id(p) for group in select_parameters(model, stage.groups) for p in group.values()}
    return {name: digest_of_tensor(p) for name, p in model.named_parameters() if id(p) not in learning}


def proved(before: Mapping[str, str], model: nn.Module, stage: Stage) -> dict[str, Any]:
    """The proof for the record: how many parameters stood still, and one digest of them all.

    Raises AssertionError naming one that moved.
    """
    after = frozen_digests(model, stage)
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if moved:
        raise AssertionError(f"stage {stage.name} changed {moved[0]} ({len(moved)} in all), which must stay frozen.")
    return {"parameters": len(after), "sha256": combined(after)}


def combined(digests: Mapping[str, str]) -> str:
    """One digest of many, by name."""
    text = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()
