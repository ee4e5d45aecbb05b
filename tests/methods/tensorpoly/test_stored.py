"""A saved multi-task adapter comes back whole: order, ranks, radices, tasks, sharing; and only with its own config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.errors import CatalogError
from mixwright.methods.tensorpoly.model import TaskComposedModel

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "poly": {"rank": 2, "num_latent": 3},
    "mhr": {"rank": 2, "num_latent": 3, "heads": 4},
    "tlora": {"rank": 2, "num_latent": 2, "order": 3},
    "tensorpoly-1": {"rank": 2, "num_latent": 3, "init": "released"},
    "tensorpoly-2": {"rank": 2, "num_latent": 3, "order": 4},
    "entangled": {"rank": 2, "num_latent": 2, "groups": 3, "factorization": "exact"},
}
TASKS = ["nli", "paraphrase", "sentiment"]


def composed(kind: str, family: str = "t5", **settings: Any) -> TaskComposedModel:
    model = mw.compose(
        "tensorpoly", backbone=tiny_backbone(family), tasks=TASKS, experts=kind, **{**KINDS[kind], **settings}
    )
    assert isinstance(model, TaskComposedModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=draw))
    return model


def outputs(model: TaskComposedModel) -> list[Tensor]:
    inputs = example_inputs(model.backbone, 9) or {}
    found: list[Tensor] = []
    for tasks in ("nli", ["paraphrase", "sentiment"]):
        with torch.no_grad(), model.with_task(tasks):
            found.append(model(**inputs)[0])
    return found


@pytest.mark.parametrize("share", ["layer", "block", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_after_loading(kind: str, share: str, tmp_path: Path) -> None:
    family = "llama" if share == "block" else "t5"
    model = composed(kind, family, share=share)
    model.save_pretrained(tmp_path / "saved")
    loaded = mw.load(tmp_path / "saved", backbone=tiny_backbone(family))
    assert isinstance(loaded, TaskComposedModel)
    assert loaded.tasks == tuple(TASKS) and loaded.experts == model.experts
    assert loaded.cost() == model.cost(), "shared routers are one object again"
    assert {k: v.shape for k, v in loaded.added_state().items()} == {k: v.shape for k, v in model.added_state().items()}
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), outputs(loaded), strict=True))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "composition.yaml").read_text() == (
        tmp_path / "saved" / "composition.yaml"
    ).read_text()


def test_a_loaded_model_trains_on(tmp_path: Path) -> None:
    composed("tensorpoly-1", share="block").save_pretrained(tmp_path / "saved")
    loaded = mw.load(tmp_path / "saved", backbone=tiny_backbone("t5")).train()
    inputs = example_inputs(loaded.backbone) or {}
    with loaded.with_task([0, 1]):
        loaded(**inputs)[0].square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in loaded.parameters())


OTHERS: dict[str, tuple[str, str, str]] = {
    "order": (
        "order: 2",
        "order: 4",
        r"SHAPE encoder.*tensorpoly-1 of order 4.*what was saved is of order 2, .*\(3, 2, 6\)",
    ),
    "rank": ("rank: 2", "rank: 4", r"SHAPE .*rank 4.*Load it with the config that it was saved with"),
    "kind": ("experts: tensorpoly-1", "experts: tensorpoly-2", r"SHAPE .*tensorpoly-2 of order 2.*groups 1"),
    "latent": ("num_latent: 3", "num_latent: 2", r"SHAPE pool.* 3 experts and the config num_latent=2"),
    "tasks": (", sentiment]", "]", r"SHAPE .*logits \(3, 3\).*2 tasks.*wants logits \(2, 3\)"),
    "unrouted": ("experts: tensorpoly-1", "experts: tlora", r"SHAPE .*logits \(3, 3\).*wants weights \(3,\)"),
    "sharing": ("share: layer", "share: model", r"TENSOR .*share='model'.*'the model', but other logits"),
    "radices": ("factorization: ceil", "factorization: exact", r"SHAPE .*exact radices"),
    "impossible": ("order: 2", "order: 9", r"CONFIG .*order=9: expected 1 to 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_config_of_another_shape_gets_one_clear_error(case: str, tmp_path: Path) -> None:
    written, changed, message = OTHERS[case]
    composed("tensorpoly-1").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "composition.yaml"
    text = path.read_text()
    assert text.count(written) == 1, text
    path.write_text(text.replace(written, changed))
    backbone = tiny_backbone("t5")
    before = [type(module) for module in backbone.modules()]
    with pytest.raises(CatalogError, match=message) as caught:
        mw.load(tmp_path / "saved", backbone=backbone)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in backbone.modules()] == before


def test_the_card_tells_of_tasks_and_not_of_a_catalogue(tmp_path: Path) -> None:
    composed("tensorpoly-1").save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "# tensorpoly: 3 tasks on " in text and "## Tasks" in text and "- sentiment\n" in text
    assert 'model.with_task("nli")' in text and "2405.16671" in text
    assert "Their licence: not stated." in text
    composed("tensorpoly-1", licence="CC-BY-4.0").save_pretrained(tmp_path / "licensed")
    licensed = (tmp_path / "licensed" / "README.md").read_text()
    assert "license: cc-by-4.0\n" in licensed and "Their licence: CC-BY-4.0." in licensed
    assert "## Experts" not in text and "not measured" not in text and "license:" not in text
    assert "- `rank`: 2" in text and "`tasks`" not in text
