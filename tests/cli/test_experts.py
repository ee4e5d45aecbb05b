"""The verbs on experts, as a person and as a machine call them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.errors import CatalogError


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "law"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {f"base_model.model.layers.{i}.q.lora_{s}.weight": torch.randn(4, 4) for i in range(2) for s in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Run `mixwright experts VERB my-catalog ...`; what it printed, as JSON where that was asked for."""

    def call(verb: str, *arguments: str) -> Any:
        result = CliRunner().invoke(build(), ["experts", verb, str(tmp_path / "my-catalog"), *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return json.loads(result.stdout) if "--json" in arguments else (result.exit_code, result.stdout)

    return call


def test_the_life_of_an_expert(adapter: Path, run: Any) -> None:
    assert run("add", str(adapter), "--dry-run", "--json")["dry_run"] is True
    assert run("add", str(adapter), "--licence", "mit", "--task", "law")[0] == 0
    assert run("add", str(adapter), "--id", "medicine", "--json")["id"] == "medicine"
    assert run("disable", "law", "--json") == {"states": {"law": "disabled"}}
    listed = run("list", "--json")
    assert [(one["id"], one["state"]) for one in listed["experts"]] == [("law", "disabled"), ("medicine", "active")]
    assert run("enable", "law") == (0, "law: active\n")
    run("retire", "law", "medicine")
    assert run("restore", "law", "medicine", "--json")["states"] == {"law": "active", "medicine": "active"}
    shown = run("show", "law", "--json")
    assert shown["licence"] == "mit" and set(shown["sites"]) == {"layers.0.q", "layers.1.q"}
    assert run("diff", "law", "medicine", "--json")["cosine"] == pytest.approx(1)
    assert run("remove", "law", "--yes") == (0, "law: removed\n")
    assert [one["id"] for one in run("list", "--json")["experts"]] == ["medicine"]


def test_tables_show_third_party_text_as_text(adapter: Path, run: Any) -> None:
    run("add", str(adapter), "--licence", "mit", "--task", "[red]law")
    for verb in (("list",), ("show", "law"), ("diff", "law", "law"), ("check",)):
        status, text = run(*verb)
        assert status == 0 and "law" in text
    assert "[red]law" in run("show", "law")[1]


def test_check_fails_for_a_changed_file(adapter: Path, run: Any, tmp_path: Path) -> None:
    run("add", str(adapter), "--licence", "mit")
    found = run("check", "--json")
    assert {one["level"] for one in found["findings"]} == {"warning"} and found["checked"] == ["law"]
    with (tmp_path / "my-catalog" / "experts" / "law" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"x")
    status, text = run("check")
    assert status == 1 and "HASH" in text


def test_remove_wants_yes_and_never_asks(adapter: Path, run: Any) -> None:
    run("add", str(adapter))
    with pytest.raises(ValueError, match="--yes"):
        run("remove", "law")
    assert len(run("list", "--json")["experts"]) == 1


def test_what_is_not_there(adapter: Path, run: Any) -> None:
    with pytest.raises(FileNotFoundError):
        run("list")
    run("add", str(adapter))
    with pytest.raises(CatalogError, match='^MISSING expert "nobody"'):
        run("disable", "law", "nobody")
    assert run("list", "--json")["experts"][0]["state"] == "active"  # nothing was changed before the refusal


@pytest.mark.parametrize(
    "verb", ["add", "list", "show", "check", "diff", "disable", "enable", "retire", "restore", "remove"]
)
def test_every_help_has_an_example(verb: str) -> None:
    result = CliRunner().invoke(build(), ["experts", verb, "--help"])
    assert result.exit_code == 0 and f"mixwright experts {verb} my-catalog" in result.stdout
