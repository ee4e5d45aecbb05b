"""Importing the package and asking for help load no torch and take under 0.3 s of CPU time."""

import json
import pkgutil
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import mixwright
import mixwright.methods

SOURCE = str(Path(mixwright.__file__).parents[1])
HEAVY = {"torch", "transformers", "accelerate", "numpy", "datasets", "peft"}
LIGHT = [
    "mixwright",
    "mixwright.cli",
    "mixwright.config",
    "mixwright.recipe",
    "mixwright.errors",
    "mixwright.methods.base",
]
LIGHT += ["mixwright.yaml12", "mixwright.files", "mixwright.catalog.card"]
LIGHT += [f"mixwright.methods.{m.name}.config" for m in pkgutil.iter_modules(mixwright.methods.__path__) if m.ispkg]
BUDGET = 0.3


def fresh(code: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {SOURCE!r}); {code}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cpu_seconds(code: str) -> float:
    """The least CPU time of up to a dozen fresh interpreters: a busy machine only ever adds."""
    least = float("inf")
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        fresh(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        least = min(least, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if least < BUDGET:
            break
    return least


@pytest.mark.parametrize("module", LIGHT)
def test_loads_nothing_heavy(module: str) -> None:
    loaded = json.loads(
        fresh(f"import json, {module}; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))")
    )
    assert not HEAVY & set(loaded)


HELP = "sys.argv = ['mixwright', '--help']; from mixwright.cli import main\ntry: main()\nexcept SystemExit: pass"


def test_help_loads_nothing_heavy() -> None:
    loaded = fresh(f"{HELP}\nprint('LOADED', *sorted(sys.modules))").split("LOADED")[1].split()
    assert not HEAVY & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize("code", ["import mixwright", "import mixwright.cli", HELP], ids=["import", "cli", "help"])
def test_takes_little_cpu_time(code: str) -> None:
    assert cpu_seconds(code) < BUDGET
