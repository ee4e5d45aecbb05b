"""What a person forbade, froze or left out: saved with the pool, said on its card and page, and held to."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.episodic import EpisodicModel
from mixwright.errors import CatalogError
from mixwright.evaluation.pool import pool_of
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest
from mixwright.report.pool_page import pool_page
from mixwright.routing import Condition, Routing, SupportSet

from .pools import fresh_pool, moved

SUPPORT = SupportSet(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(3).repeat(2))


def _pool(changes: str = "shared") -> FewShotModel:
    model = fresh_pool(changes=changes)
    if changes == "shared":
        return moved(model)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in model.mixture.experts.parameters():
            delta.copy_(0.1 * torch.randn(delta.shape, generator=draw))
    return model.eval()


def _again(folder: Path) -> EpisodicModel:
    model = mw.load(folder, backbone=tiny_backbone("vit"))
    assert isinstance(model, EpisodicModel)
    return model.eval()


@pytest.mark.parametrize("changes", ["shared", "own"])
def test_what_was_forbidden_stays_so_when_loaded(changes: str, tmp_path: Path) -> None:
    model = _pool(changes)
    names = model.forbid("*attention*", "*.bias")
    model.save_pretrained(tmp_path / "pool")
    again = _again(tmp_path / "pool")
    assert again.forbidden == names and set(names) < set(again.mixture.experts.names)
    before = tensor_digest(again.backbone)
    with again.adapted(SUPPORT):
        inside = tensor_digest(again.backbone)
    assert all(inside[name] == before[name] for name in names) and inside != before
    again.forbid()
    again.save_pretrained(tmp_path / "freed")
    assert _again(tmp_path / "freed").forbidden == ()
    assert "forbidden" not in (tmp_path / "freed" / "composition.yaml").read_text()


@pytest.mark.parametrize("changes", ["shared", "own"])
def test_what_was_frozen_stays_so_when_loaded_and_trained(changes: str, tmp_path: Path) -> None:
    model = _pool(changes)
    model.freeze_expert("expert-1")
    model.save_pretrained(tmp_path / "pool")
    again = _again(tmp_path / "pool")
    assert again.frozen_experts == ("expert-1",)
    alone, other = (Routing(torch.eye(3)[m], 3) for m in (1, 0))
    before = {name: tensor.clone() for name, tensor in again.weights_for(alone).items()}
    moving = {name: tensor.clone() for name, tensor in again.weights_for(other).items()}
    experts: Any = again.train().mixture.experts
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.5, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        again(SUPPORT.inputs, condition=Condition(support=SUPPORT)).last_hidden_state.square().sum().backward()
        optimizer.step()
        experts.after_step()
    after, others = again.eval().weights_for(alone), again.weights_for(other)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(moving[name], others[name]) for name in moving)
    again.freeze_expert("expert-1", False)
    again.save_pretrained(tmp_path / "freed")
    assert _again(tmp_path / "freed").frozen_experts == ()


def test_card_page_and_report_say_what_a_person_decided(tmp_path: Path) -> None:
    model = _pool()
    assert "a person" not in pool_page(pool_of(model))
    names = model.forbid("*.bias")
    model.freeze_expert("expert-2")
    model.set_active(["expert-0", "expert-2"])
    model.save_pretrained(tmp_path / "pool")
    card = (tmp_path / "pool" / "README.md").read_text()
    pool = pool_of(_again(tmp_path / "pool"))
    assert (pool.forbidden, pool.frozen, pool.active) == (names, ("expert-2",), ("expert-0", "expert-2"))
    for text in (card, pool_page(pool)):
        assert "never chosen: expert-1." in text and f"{len(names)} parameters stay as pretrained" in text
        assert "leaves as they are: expert-2." in text
    assert not set(names) & {one.name for one in pool.tensors} and pool.tensors


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("forbidden", ["no.such.weight"], "'no.such.weight' is none of the parameters"),
        ("frozen", ["nobody"], "no expert 'nobody'"),
        ("forbidden", "all", "forbidden"),
    ],
)
def test_a_decision_about_something_that_is_not_there_is_refused(
    key: str, value: Any, said: str, tmp_path: Path
) -> None:
    _pool().save_pretrained(tmp_path / "pool")
    written = yaml.safe_load((tmp_path / "pool" / "composition.yaml").read_text())
    (tmp_path / "pool" / "composition.yaml").write_text(yaml.safe_dump({**written, key: value}))
    backbone = tiny_backbone("vit")
    before = tensor_digest(backbone)
    with pytest.raises(CatalogError, match=said) as caught:
        mw.load(tmp_path / "pool", backbone=backbone)
    assert caught.value.code == "CONFIG" and tensor_digest(backbone) == before


def test_soft_merging_is_reported_and_says_what_it_is_not(tmp_path: Path) -> None:
    model = fresh_pool(changes="own")
    assert model.sparsity().tolist() == [1.0, 1.0, 1.0]  # nothing has learned yet
    model = _pool("own")
    assert model.sparsity().tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="changes='own'"):
        _ = model.deltas
    pool = pool_of(model)
    page = pool_page(pool)
    assert not pool.masked and pool.union == 1.0 and pool.fractional == (0.0, 0.0, 0.0)
    assert "soft merging" in page and "How alike the experts are" not in page and "Chance level" not in page
    (first, *_) = pool.tensors
    even = model.weights_for(Routing(torch.full((3,), 1 / 3), 3))[first.name].detach()
    base = model.pristine()[first.name]
    assert first.change == pytest.approx(float((even - base).norm() / base.norm()), rel=1e-4) and first.moved == 1.0
    model.save_pretrained(tmp_path / "pool")
    assert "soft merging" in (tmp_path / "pool" / "README.md").read_text()
    assert model.export(SUPPORT).keys() == model.backbone.state_dict().keys()
