"""Searches that try one choice after another: how many there are, what each costs, and that the best one is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.methods.manticore.enumerating import grid_choices, one_hot_choices
from mixwright.methods.manticore.losses import mean_loss
from mixwright.methods.manticore.model import compose
from mixwright.methods.manticore.search_stage import Search

from .pair import config_of, job_in, tiny_pair


def test_grids_get_coarser_and_then_are_refused() -> None:
    assert [row[0][0] for row in grid_choices(1, 2)] == pytest.approx([n / 10 for n in range(11)])
    assert len(grid_choices(2, 2)) == 121 and len(grid_choices(3, 2)) == 64 and len(grid_choices(1, 3)) == 66
    assert all(sum(row) == pytest.approx(1) for choice in grid_choices(2, 3) for row in choice)
    with pytest.raises(ValueError, match="grid: 5 blocks of 2 components have more than 121 points"):
        grid_choices(5, 2)


def test_paths_are_every_way_to_give_away_the_blocks() -> None:
    paths = one_hot_choices(3, 2)
    assert len(set(paths)) == 8 and paths[1] == ((1.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    with pytest.raises(ValueError, match="halving: 3 components in 4 blocks have 81 paths, more than 64"):
        one_hot_choices(4, 3)


@pytest.mark.parametrize(("search", "blocks", "runs"), [("grid", 1, [1] * 11), ("halving", 2, [1] * 4 + [2] * 2)])
def test_the_best_of_all_runs_is_what_is_left(search: Any, blocks: int, runs: list[int], tmp_path: Path) -> None:
    config = config_of(search=search, num_blocks=blocks, search_steps=max(runs), learning_rate=1e-2)
    model, job = compose(config, tiny_pair()), job_in(tmp_path, batch_size=8)
    assert job.validation is not None
    stage = Search(config)
    fitted = stage._one_by_one(model, job, True)
    found = stage.found
    assert found is not None and [one.steps for one in found.tried] == runs and fitted.steps == sum(runs)
    last = [one for one in found.tried if one.steps == runs[-1]]
    best = min(last, key=lambda one: one.loss)
    assert torch.allclose(model.mixture_weights, torch.tensor(best.weights), atol=1e-6)
    assert mean_loss(model, job.validation) == pytest.approx(best.loss, rel=1e-6)
    assert len({one.loss for one in found.tried}) > 2
    if search == "halving":
        first = sorted(found.tried[:4], key=lambda one: one.loss)[:2]
        assert {one.weights for one in last} == {one.weights for one in first}  # the better half went on
    with pytest.raises(ValueError, match=f"search={search} compares runs on held-out data; give data.validation"):
        Search(config)._one_by_one(model, job_in(tmp_path, held_out=False), True)
