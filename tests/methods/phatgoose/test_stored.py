"""A composition of the catalogue's experts, saved and loaded, routes as before under every option."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright import artifact
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.composition.inputs import example_inputs
from mixwright.composition.model import ComposedModel
from mixwright.methods.base import load
from mixwright.sites import linear_sites, target_sites

PEFT_CONFIG = {"base_model_name_or_path": "tiny", "task_type": None}

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {"router": "gates"},
    "arrow": {"router": "arrow"},
    "signatures": {"router": "signatures", "top_k": 3},
    "null": {"router": "gates", "null_expert": 0.0, "top_k": 4},
    "consensus": {"router": "gates", "consensus": 2.0},
    "pooling and prior": {"router": "gates", "pooling": 0.5, "prior": 1.0, "null_expert": 0.3},
    "quality": {"router": "gates", "quality": 2.0},
}


def shelf(backbone: Any, folder: Path) -> Catalog:
    """Three experts of different ranks and sites, with gates, signatures and measured gains."""
    draw = torch.Generator().manual_seed(0)
    sites = linear_sites(backbone)
    paths = target_sites(backbone, ("all-linear",))
    catalog = Catalog(folder, backbone)
    for number, expert in enumerate(("one", "two", "three")):
        own = [path for path in paths if number != 2 or path.rsplit(".", 1)[-1] in {paths[0].rsplit(".", 1)[-1]}]
        rank = 2 + number
        catalog.publish(
            expert,
            {
                path: LoraFactors(
                    torch.randn(rank, sites[path].d_in, generator=draw) * 0.3,
                    torch.randn(sites[path].d_out, rank, generator=draw) * 0.3,
                    1.0,
                )
                for path in own
            },
            peft_config={"fan_in_fan_out": any(sites[path].transposed for path in own)},
            gates={path: torch.randn(sites[path].d_in, generator=draw) for path in own},
            signatures={path: signature(sites[path].d_in, draw) for path in own},
            licence="mit",
            quality={"gain": {"value": 0.1 * number}},
        )
    return catalog


def signature(width: int, draw: torch.Generator) -> dict[str, Tensor]:
    return {"mean": torch.randn(width, generator=draw), "variance": torch.rand(width, generator=draw) + 0.5}


def run(model: ComposedModel) -> list[Tensor]:
    inputs = example_inputs(model.backbone, 9) or {}
    with torch.no_grad(), model.trace() as trace:
        out = model(**inputs)
    return [out[0], *(t for s in sorted(trace) for r in trace[s] for t in (r.weights, r.indices))]


@pytest.mark.parametrize("family", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_same_routing_after_loading(option: str, family: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(family)
    method = load("phatgoose")
    model = method.compose(method.config(**OPTIONS[option]), [backbone], shelf(backbone, tmp_path / "shelf"))
    model.save_pretrained(tmp_path / "saved")
    loaded = artifact.load(tmp_path / "saved", backbone=tiny_backbone(family))
    assert loaded.experts == model.experts
    assert all(torch.equal(a, b) for a, b in zip(run(model), run(loaded), strict=True))


def test_the_card_names_its_experts_and_the_paper(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama")
    method = load("phatgoose")
    model = method.compose(method.config(), [backbone], shelf(backbone, tmp_path / "shelf"))
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "| three |  | mit |" in text
    assert "@inproceedings{muqeeth2024learning" in text
    assert "0.200 nats per token" in text
