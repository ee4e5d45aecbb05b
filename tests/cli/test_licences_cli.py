"""`licences` prints a ledger and fails a build: unknown, conflicting and unwanted licences have exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mixwright.cli import build
from mixwright.errors import CatalogError


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(build(), ["licences", *arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.output


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for name, licence in (("left", "apache-2.0"), ("right", "cc-by-nc-4.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"method: manticore\nbackbones: [{tmp_path / 'left'}, {tmp_path / 'right'}]\n")
    return path


def test_a_recipe_is_checked_before_anything_is_trained(recipe: Path) -> None:
    text = run(str(recipe))
    assert "left: Apache-2.0 (read in README.md)" in text
    assert "non-commercial: no commercial use (right)" in text
    assert "not legal advice" in text


def test_a_build_fails_by_conflicts_and_by_what_is_forbidden(recipe: Path) -> None:
    assert "forbidden: non-commercial" in run(str(recipe), "--forbid", "non-commercial", exit_code=1)
    stated = ("--set", "config.licences={left: GPL-3.0-only}")
    assert "does not go together" in run(str(recipe), *stated, exit_code=1)
    plain = json.loads(run(str(recipe), *stated, "--json", exit_code=1))
    assert plain["conflicts"][0]["components"] == ["left", "right"]


def test_unknown_licences_and_duties_are_refused(recipe: Path) -> None:
    (recipe.parent / "left" / "README.md").write_text("# Nothing\n")
    with pytest.raises(CatalogError, match="^LICENCE"):
        run(str(recipe))
    with pytest.raises(ValueError, match="--forbid 'money': expected one of attribution"):
        run(str(recipe), "--forbid", "money")
