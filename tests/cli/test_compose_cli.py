"""`compose` from flags and from a recipe, and what the other verbs make of the folder that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from mixwright.backbones.hf import byte_tokenizer, load_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.store import Catalog
from mixwright.cli import build
from mixwright.sites import linear_sites

EXPERTS = ("code", "law", "yaml")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, its tokenizer, and a catalogue of three gated experts."""
    folder = tmp_path_factory.mktemp("shelf")
    tiny_backbone("llama").save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    backbone = load_backbone(folder / "base")
    catalog = Catalog(folder / "experts", backbone)
    for seed, expert in enumerate(EXPERTS):
        made = torch.Generator().manual_seed(seed)
        sites = {path: site for path, site in linear_sites(backbone).items() if path.endswith(("q_proj", "up_proj"))}
        catalog.publish(
            expert,
            {
                path: LoraFactors(
                    torch.randn(2, site.d_in, generator=made) * 0.3,
                    torch.randn(site.d_out, 2, generator=made) * 0.3,
                    0.5,
                )
                for path, site in sites.items()
            },
            peft_config={"task_type": "CAUSAL_LM", "base_model_name_or_path": str(folder / "base")},
            gates={path: torch.randn(site.d_in, generator=made) for path, site in sites.items()},
            licence="MIT",
        )
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def flags(shelf: Path) -> tuple[object, ...]:
    return ("--backbone", shelf / "base", "--catalog", shelf / "experts")


def test_flags_and_recipe_give_the_same_composition(shelf: Path, tmp_path: Path) -> None:
    by_flags = invoke(
        "compose", "--method", "phatgoose", *flags(shelf), "-o", tmp_path / "a", "--set", "top_k=1", "--json"
    )
    assert by_flags.exit_code == 0, (by_flags.output, by_flags.exception)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"backbone: {shelf / 'base'}\ncatalog: {shelf / 'experts'}\noutput_dir: {tmp_path / 'b'}\n")
    by_recipe = invoke("compose", recipe, "--set", "config.top_k=1", "--json")
    assert by_recipe.exit_code == 0, (by_recipe.output, by_recipe.exception)
    one, other = json.loads(by_flags.stdout), json.loads(by_recipe.stdout)
    assert one["experts"] == list(EXPERTS) and one["sites"] == 4 and one["config"]["top_k"] == 1
    assert {**one, "folder": ""} == {**other, "folder": ""}
    for name in ("composition.yaml", "added.safetensors", "experts.lock.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_says_what_was_composed_and_what_comes_next(shelf: Path, tmp_path: Path) -> None:
    result = invoke("compose", *flags(shelf), "--output", tmp_path / "out")
    assert result.exit_code == 0, (result.output, result.exception)
    printed = " ".join(result.output.split())
    assert "3 experts (code, law, yaml) at 4 sites" in printed and "mixwright explain" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x"), "nothing to compose: give --backbone and --catalog"),
        (("--method", "tensorpoly", "--output", "x"), "nothing to compose: give --backbone, or"),
        (("--backbone", "b", "--catalog", "c"), "say where the composition goes"),
        (("--backbone", "b", "--catalog", "c", "-o", "x", "--set", "topk"), "KEY=VALUE"),
    ],
)
def test_refuses_half_a_question(arguments: tuple[str, ...], message: str) -> None:
    result = invoke("compose", *arguments)
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_method_with_experts_of_its_own_needs_no_catalogue(shelf: Path, tmp_path: Path) -> None:
    settings = ("--set", "tasks=[nli, sentiment]", "--set", "num_latent=3")
    options = ("--method", "tensorpoly", "--backbone", shelf / "base", "-o", tmp_path / "out", "--json")
    result = invoke("compose", *options, *settings)
    assert result.exit_code == 0, (result.output, result.exception)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: tensorpoly\nbackbone: {shelf / 'base'}\noutput_dir: {tmp_path / 'out'}\nconfig: {{num_latent: 3}}\n"
        "data: {tasks: {nli: nli.jsonl, sentiment: sentiment.jsonl}}\n"
    )
    assert invoke("compose", recipe, "--json").stdout == result.stdout, "the recipe that it is trained by"
    facts = json.loads(result.stdout)
    assert facts["experts"] == ["latent-0", "latent-1", "latent-2"] and facts["config"]["tasks"] == ["nli", "sentiment"]


def test_refuses_a_setting_that_the_method_does_not_have(shelf: Path, tmp_path: Path) -> None:
    result = invoke("compose", *flags(shelf), "-o", tmp_path / "out", "--set", "topk=1")
    assert isinstance(result.exception, ValueError) and "top_k" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_was_composed_is_explained_and_runs(shelf: Path, tmp_path: Path) -> None:
    folder, text = tmp_path / "out", "name: [a, b]  # of the law"
    assert invoke("compose", *flags(shelf), "--output", folder).exit_code == 0
    explained = invoke("explain", folder, "--text", text, "--output", tmp_path / "page.html", "--json")
    assert explained.exit_code == 0, (explained.output, explained.exception)
    found: dict[str, Any] = json.loads(explained.stdout)
    assert "".join(token["text"] for token in found["tokens"]) == text
    assert found["composition"]["method"] == "phatgoose"
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "MIT" in page and found["composition"]["backbone"]["fingerprint"] in page
    ran = invoke("run", folder, "--prompt", text, "--max-new-tokens", 4, "--json")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert {one["expert"] for one in json.loads(ran.stdout)["experts"]} <= set(EXPERTS)
