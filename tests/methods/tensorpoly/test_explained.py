"""Every member of the family is explained as it is composed, and from the folder that it is saved in."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.evaluation.task_routing import task_routing
from mixwright.report.task_page import task_page

TASKS = ["mood", "topic", "entail"]


@pytest.mark.parametrize(
    ("experts", "more"),
    [
        ("lora", {}),
        ("poly", {"num_latent": 3}),
        ("mhr", {"num_latent": 3, "heads": 8}),
        ("tlora", {"num_latent": 3, "init": "released"}),
        ("tensorpoly-1", {"num_latent": 3, "order": 3, "init": "released"}),
        ("tensorpoly-1", {"num_latent": 3, "order": 4, "factorization": "exact", "share": "model"}),
        ("tensorpoly-2", {"num_latent": 3, "init": "released"}),
        ("entangled", {"num_latent": 3, "order": 4, "init": "released", "share": "block"}),
    ],
)
def test_every_member_has_a_page(experts: str, more: dict[str, object]) -> None:
    backbone = tiny_backbone("llama", num_hidden_layers=1)
    sites = {"target_modules": ["q_proj", "down_proj"], "rank": 2}
    found = task_routing(mw.compose("tensorpoly", backbone=backbone, tasks=TASKS, experts=experts, **sites, **more))
    assert found.tasks == TASKS and [layer.site.split(".")[-1] for layer in found.layers] == ["q_proj", "down_proj"]
    orders = (more.get("order") or 2) if experts in ("tensorpoly-2", "entangled") else 1
    moved = more.get("init") == "released"
    for layer in found.layers:
        assert len(layer.share[0]) == orders and any(layer.size) == moved
        assert all(sum(order) == pytest.approx(float(moved)) for task in layer.share for order in task)
    page = task_page(found)
    assert ("Untrained." in page) != moved and all(task in page for task in TASKS)


def test_a_saved_model_is_explained_by_the_command(tmp_path: Path) -> None:
    tiny_backbone("llama", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    settings = {"tasks": TASKS, "target_modules": ["q_proj"], "rank": 2, "init": "released"}
    model = mw.compose("tensorpoly", backbone=str(tmp_path / "base"), **settings)
    model.save_pretrained(tmp_path / "multitask")
    result = CliRunner().invoke(build(), ["explain", str(tmp_path / "multitask"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tasks"] == TASKS and found["composition"]["method"] == "tensorpoly"
    assert found["layers"][0]["size"] == pytest.approx(task_routing(model).layers[0].size, rel=1e-5)
    assert [alarm["kind"] for alarm in found["alarms"]] == ["uniform"]
