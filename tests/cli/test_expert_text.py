"""`experts measure` and `experts sign`: what an expert learns from text goes on its card, and routes."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.adapter import LoraFactors
from mixwright.cli import build
from mixwright.sites import linear_sites, target_sites


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    backbone = tiny_backbone("llama", seed=1)
    backbone.save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    catalog = mw.Catalog(tmp_path / "experts", backbone)
    sites = linear_sites(backbone)
    for number, name in enumerate(("law", "medicine")):
        draw = torch.Generator().manual_seed(number)
        factors = {
            path: LoraFactors(
                torch.randn(4, sites[path].d_in, generator=draw),
                0.1 * torch.randn(sites[path].d_out, 4, generator=draw),
                1.0,
            )
            for path in target_sites(backbone, ("all-linear",))
        }
        catalog.publish(name, factors, peft_config={"task_type": "CAUSAL_LM"}, licence="mit")
    text = tmp_path / "held-out.jsonl"
    text.write_text("".join(json.dumps({"text": f"clause {i} of the contract"}) + "\n" for i in range(8)))
    return tmp_path / "backbone", tmp_path / "experts", text


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(build(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_measurement_goes_on_the_card_and_can_move_the_score(places: tuple[Path, Path, Path]) -> None:
    backbone, catalog, text = places
    for name in ("law", "medicine"):
        said = json.loads(
            _run(
                "experts", "measure", catalog, name, "--backbone", backbone, "--text", text, "--general", text, "--json"
            )
        )
        quality = mw.Catalog(catalog).card(name).quality
        assert said["quality"]["gain"] == quality["gain"]
        # the same text as general text: what is gained is not harmed
        assert quality["harm"]["value"] == pytest.approx(-quality["gain"]["value"])
        assert quality["gain"]["low"] <= quality["gain"]["value"] <= quality["gain"]["high"]
    model = mw.compose("phatgoose", backbone=str(backbone), catalog=catalog, quality=2.0, top_k=1)
    offset = next(iter(model.mixtures.values())).router.get_buffer("offset")
    gains = [mw.Catalog(catalog).card(name).quality["gain"]["value"] for name in model.experts]
    assert offset.tolist() == pytest.approx([2.0 * gain for gain in gains])


def test_quality_that_was_never_measured_is_named(places: tuple[Path, Path, Path]) -> None:
    backbone, catalog, _ = places
    with pytest.raises(ValueError, match="law.*experts measure"):
        mw.compose("phatgoose", backbone=str(backbone), catalog=catalog, quality=1.0)


def test_signed_experts_are_routed_by_their_signatures(places: tuple[Path, Path, Path]) -> None:
    backbone, catalog, text = places
    assert mw.compose("phatgoose", backbone=str(backbone), catalog=catalog).composition.config["router"] == "arrow"
    for name in ("law", "medicine"):
        assert "signature at 14 sites" in _run("experts", "sign", catalog, name, "--backbone", backbone, "--text", text)
    model = mw.compose("phatgoose", backbone=str(backbone), catalog=catalog)
    assert model.composition.config["router"] == "signatures"
