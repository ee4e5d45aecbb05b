"""Meta-tuning on tiny images, through the one loop."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches
from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.order import Order
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.recipe import groups, stages
from mixwright.ops.digest import tensor_digest
from mixwright.training.fit import fit
from mixwright.training.stage import Stage

CONFIG = SmatConfig(experts=3, steps=6, learning_rate=0.05, sparsity=0.5)


def _domain(name: str = "waves", classes: int = 8, items: int = 8) -> Domain:
    draw = torch.Generator().manual_seed(0)
    shapes = torch.randn(classes, 1, 3, 16, 16, generator=draw)
    images = (shapes + 0.8 * torch.randn(classes, items, 3, 16, 16, generator=draw)).flatten(0, 1)
    labels = [label for label in range(classes) for _ in range(items)]
    return Domain(name, images, labels, tuple(f"class-{i}" for i in range(classes)))


def _batches(count: int = 1000) -> Batches:
    source = FixedEpisodes(domains=(_domain(),), ways=4, shots=2, queries=3, seed=0)

    def collate(rows: Sequence[Any]) -> Any:
        return source.episode(rows[0])

    return Batches(range(count), collate, batch_size=1, seed=0, order=Order(count, 0), digest="waves")


def _model(config: SmatConfig = CONFIG) -> tuple[FewShotModel, Stage]:
    model = mw.compose("smat", backbone=tiny_backbone("vit"), experts=config.experts, sparsity=config.sparsity)
    assert isinstance(model, FewShotModel)
    (stage, *_) = stages(config)
    return model, replace(stage, groups=groups(config, model))


def test_meta_tuning_moves_the_pool_and_no_bit_of_the_backbone() -> None:
    model, stage = _model()
    before = tensor_digest(model.backbone)
    keys = model.router.keys.detach().clone()
    fit(model, stage, _batches())
    assert tensor_digest(model.backbone) == before
    changed = [name for name, delta in model.deltas.delta.items() if delta.abs().sum() > 0]
    assert len(changed) >= 0.9 * len(model.deltas.delta) - 2  # the pooler is not read
    assert not torch.equal(model.router.keys, keys)
    assert float(model.router.temperature) == 0.5


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, stage = _model()
    fit(whole, stage, _batches(), folder=tmp_path / "whole")
    cut, _ = _model()
    with pytest.raises(KeyboardInterrupt):
        fit(cut, replace(stage, objective=_stops_after(stage, 3)), _batches(), folder=tmp_path / "cut")
    again, _ = _model()
    fit(again, stage, _batches(), folder=tmp_path / "cut", resume=True, force=True)
    expected, found = whole.added_state(), again.added_state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def _stops_after(stage: Stage, calls: int) -> Any:
    left = [calls]

    def objective(model: Any, batch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return stage.objective(model, batch)

    return objective
