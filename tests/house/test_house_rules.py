"""The house rules that can be checked are checked: sizes, forbidden words, rooms, documents."""

import ast
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mixwright
import mixwright.methods
from mixwright.cli.doctor import _EXTRAS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "mixwright"
FILES = sorted(SOURCE.rglob("*.py"))
TEXTS = {path: path.read_text() for path in FILES}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
WALL = 400
HEADINGS = ("claim", "notation", "equations to code", "training", "deviations", "results")

# Only the training loop reads back what it wrote itself: optimiser and generator states of a run.
UNSAFE_READERS: frozenset[str] = frozenset({"training/checkpoint.py"})


def name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def module_of(requirement: str) -> str:
    """The module that a requirement such as `PyYAML>=6.0` brings."""
    package = re.split(r"[<>=\[;]", requirement)[0].strip().lower().replace("-", "_")
    return {"pyyaml": "yaml", "pillow": "PIL"}.get(package, package)


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def offenders(rule: Callable[[Path], bool]) -> list[str]:
    return [name(path) for path in FILES if rule(path)]


def test_a_file_stays_below_the_wall() -> None:
    assert not offenders(lambda path: len(TEXTS[path].splitlines()) > WALL), "what second thing moved in?"


def test_a_file_is_named_for_what_it_does() -> None:
    vague = {"utils", "helpers", "common", "manager"}
    assert not offenders(lambda path: bool(vague & set(path.with_suffix("").parts)))


def test_nothing_that_runs_code_from_a_file_is_used() -> None:
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}

    def rule(path: Path) -> bool:
        attributes = (ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute))
        return name(path) not in UNSAFE_READERS and bool(unsafe & imports(TREES[path]) or "torch.load" in attributes)

    assert not offenders(rule)


def test_transformers_has_one_door_and_peft_none() -> None:
    """The hybrid is a model of transformers itself: it subclasses `GenerationMixin`, and its cache is a `Cache`."""
    doors = {"backbones/hf.py", "backbones/hybrid.py", "backbones/hybrid_cache.py"}
    assert not offenders(lambda path: "transformers" in imports(TREES[path]) and name(path) not in doors)
    assert not offenders(lambda path: "peft" in imports(TREES[path])), "the tests' oracle, never our runtime"


def test_what_is_imported_is_declared() -> None:
    project = metadata()["project"]
    ours = {"mixwright", *sys.stdlib_module_names}
    core = ours | {module_of(line) for line in project["dependencies"]}
    extras = core | {module_of(line) for lines in project["optional-dependencies"].values() for line in lines}

    def top(tree: ast.Module) -> ast.Module:
        return ast.Module([node for node in tree.body if not isinstance(node, DEFINITIONS)], [])

    def enters(path: Path) -> bool:
        """Kernels are decorated where they are defined: their room imports its extra, and is imported late."""
        modules = {node.module for node in top(TREES[path]).body if isinstance(node, ast.ImportFrom)}
        return any(module and module.startswith("mixwright.ops.triton") for module in modules)

    outside = [path for path in FILES if not name(path).startswith("ops/triton/")]
    early = [name(path) for path in outside if not imports(top(TREES[path])) <= core or enters(path)]
    assert not early, "an extra is imported where it is used"
    assert not offenders(lambda path: not imports(TREES[path]) <= extras)


def test_shapes_are_not_turned_into_strings() -> None:
    future = "from __future__ import annotations"
    assert not offenders(lambda path: "jaxtyping" in TEXTS[path] and future in TEXTS[path])


def test_public_names_say_what_they_are() -> None:
    def bare(path: Path) -> bool:
        public = [node for node in TREES[path].body if isinstance(node, DEFINITIONS) and not node.name.startswith("_")]
        return not all(ast.get_docstring(node) for node in (TREES[path], *public))

    assert not offenders(bare)


def test_every_public_name_of_the_package_is_there_and_documented() -> None:
    for public in mixwright.__all__:
        value = getattr(mixwright, public)
        assert public == "__version__" or value.__doc__


def test_the_literal_list_and_the_homes_agree() -> None:
    assert sorted(mixwright.__all__) == mixwright.__all__ == dir(mixwright)
    assert set(mixwright.__all__) == {*mixwright._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="it has Catalog"):
        _ = mixwright.nothing


def test_no_room_is_called_like_a_public_function() -> None:
    rooms = {module.name for module in pkgutil.iter_modules(mixwright.__path__)}
    assert not rooms & set(mixwright.__all__)


@pytest.mark.parametrize("folder", [m.name for m in pkgutil.iter_modules(mixwright.methods.__path__) if m.ispkg])
def test_a_methods_readme_has_the_six_headings(folder: str) -> None:
    text = (SOURCE / "methods" / folder / "README.md").read_text()
    found = tuple(line.lstrip("# ").strip().lower() for line in text.splitlines() if line.startswith("## "))
    assert found == HEADINGS
    assert {"__init__.py", "config.py", "model.py", "recipe.py"} <= {
        p.name for p in (SOURCE / "methods" / folder).iterdir()
    }


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / item for item in listed.stdout.split("\0") if item]


def test_no_path_of_one_machine_is_committed() -> None:
    # Written in two parts so that this line does not find itself.
    pattern = re.compile(rb"(?<![\w.~}])/(?:wo" + rb"rk|op" + rb"t|ro" + rb"ot|home/\w+|Users/\w+)/", re.ASCII)
    texts = [path for path in tracked() if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".json", ".cfg", ""}]
    assert not [str(path.relative_to(ROOT)) for path in texts if path.is_file() and pattern.search(path.read_bytes())]


def test_the_changelog_knows_this_version() -> None:
    assert f"## {mixwright.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pins_satisfy_the_lower_bounds_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    project, groups = metadata()["project"], metadata()["dependency-groups"]
    wanted = [*project["dependencies"], *(line for group in groups.values() for line in group if isinstance(line, str))]
    for line in (*wanted, *metadata()["build-system"]["requires"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line
        assert all(bound.operator == ">=" for bound in requirement.specifier), f"{line}: lower bounds only"


def test_doctor_knows_the_extras() -> None:
    assert set(_EXTRAS) == set(metadata()["project"]["optional-dependencies"])
