"""Recipes to begin with, of three sizes: `mixwright schema manticore --preset cpu-minutes > recipe.yaml`.

In Python: mw.train({"method": "manticore", "backbones": [...], "output_dir": ..., "data": {...}, **RECIPES[NAME]}).

Each is `train` and `config` of a recipe, with the thresholds that stage *evaluate* checks. Budgets in time are
estimates for pairs of the size that is named, and were not measured; stage *inspect* says what a pair costs.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_ACCEPT: Mapping[str, Any] = {"accept_difference": 0.0, "accept_discretised": 0.1, "accept_cost": 2.5}
"""Not worse than the best single component, little lost by discretising, no dearer than both components together."""

_COMMON: Mapping[str, Any] = {"projectors": "identity", "weights_delay": 0.1, "gates": "warn", **_ACCEPT}
"""Ours: identity projectors, which start far nearer than the paper's (sheet, h.3), and weights that rest at first."""

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cpu-minutes": {
            "train": {"batch_size": 8},
            "config": {
                **_COMMON,
                "num_blocks": 2,
                "align_steps": 100,
                "align_learning_rate": 1e-3,
                "search_steps": 100,
                "tune_steps": 100,
                "discretise_steps": 50,
                "choose_every": 25,
                "controls": "tokens",
            },
        },
        "gpu-hour-125m": {
            "train": {"batch_size": 8, "accumulate": 2, "precision": "bf16"},
            "config": {
                **_COMMON,
                "num_blocks": 1,
                "align_steps": 1000,
                "search_steps": 1000,
                "weights_learning_rate": 0.05,
                "tune_steps": 1000,
                "discretise_steps": 200,
                "controls": "tokens",
            },
        },
        "gpu-day-400m": {
            "train": {"batch_size": 8, "accumulate": 2, "precision": "bf16"},
            "config": {
                **_COMMON,
                "num_blocks": 1,
                "align_steps": 12000,
                "search_steps": 6000,
                "weights_learning_rate": 0.05,
                "tune_steps": 6000,
                "discretise_steps": 1000,
                "choose_every": 500,
                "controls": "flops",
            },
        },
    }
)
"""Parts of a recipe, by name."""
