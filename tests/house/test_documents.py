"""What the documents show works: Python blocks run in order on tiny models, commands exist with the flags they name."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.recipe import read_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = (line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines())
    return [line for line in lines if line]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a reader is assumed to have: backbones with their tokenizer, and two PEFT adapters."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mixwright.backbones.hf import byte_tokenizer
    from mixwright.backbones.tiny import tiny_backbone

    monkeypatch.chdir(tmp_path)
    for name, family in (("my-backbone", "llama"), ("my-neox", "gpt_neox"), ("my-mamba", "mamba2"), ("my-vit", "vit")):
        tiny_backbone(family, seed=0).save_pretrained(name)
        byte_tokenizer().save_pretrained(name)
    for seed, name in enumerate(("law", "code")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_backbone("llama", seed=0), config).save_pretrained(f"adapters/{name}")
    return tmp_path


@pytest.mark.usefixtures("desk")
def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("python"))
    ast.parse(code)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "q_proj" in shown and "v_proj" in shown
    again, model, inputs = names["again"], names["model"], names["inputs"]
    assert (again(**inputs).logits == model(**inputs).logits).all()


def test_the_readmes_recipes_are_read(tmp_path: Path) -> None:
    from mixwright.config import decode
    from mixwright.methods.base import load

    for block in blocks("yaml"):
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        recipe = read_recipe(path)
        decode(load(recipe.method).config, recipe.config)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("mixwright ")])
def test_a_command_of_the_readme_exists_with_its_flags(line: str) -> None:
    words = shlex.split(line)[1:]
    run, verb = CliRunner(env={"COLUMNS": "200"}).invoke, words[:1]
    text = run(build(), [*verb, "--help"]).output
    if "COMMAND [ARGS]" in text:
        verb = words[:2]
        text = run(build(), [*verb, "--help"]).output
    assert f"mixwright {' '.join(verb)}" in text, text
    assert all(word in text for word in words if word.startswith("--")), text


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_method_that_is_here_stands_in_the_table() -> None:
    from mixwright.methods.base import names

    for name in names():
        assert re.search(rf"^\| `{name}` \|.*\| here \|$", README, flags=re.MULTILINE)


def test_the_readmes_tree_names_every_room_that_exists() -> None:
    rooms = {
        path.name for path in (ROOT / "src" / "mixwright").iterdir() if not path.name.startswith(("_", "py.typed"))
    }
    tree = README.split("src/mixwright/\n")[1].split("```")[0]
    assert not {room for room in rooms if not re.search(rf"\b{re.escape(room)}", tree)}
