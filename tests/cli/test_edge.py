"""What a person or a machine gets when something goes wrong: one message, and an exit code that means something."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mixwright
from mixwright.cli.edge import run_at_edge
from mixwright.errors import CatalogError, IncompatibleExpert, MissingExtra

SOURCE = str(Path(mixwright.__file__).parents[1])


def raising(error: BaseException) -> Callable[..., None]:
    def app(standalone_mode: bool = True) -> None:
        del standalone_mode
        raise error

    return app


def mixwright_command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; sys.path.insert(0, {SOURCE!r}); from mixwright.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


CASES = [
    (ValueError("bad key"), 2, "mixwright: bad key\n"),
    (CatalogError("HASH", "law", "changed on disk"), 3, "mixwright: HASH law: changed on disk\n"),
    (IncompatibleExpert("SHAPE", "law", "too wide"), 3, "mixwright: SHAPE law: too wide\n"),
    (
        FileNotFoundError(2, "No such file or directory", "x.yaml"),
        1,
        "mixwright: FILE x.yaml: No such file or directory\n",
    ),
    (KeyboardInterrupt(), 130, "mixwright: INTERRUPTED stopped\n"),
]


@pytest.mark.parametrize(("error", "status", "text"), CASES, ids=lambda value: type(value).__name__)
def test_one_line_and_a_status(
    error: BaseException, status: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixwright", "x"])
    with pytest.raises(SystemExit) as left:
        run_at_edge(raising(error))
    assert (left.value.code, capsys.readouterr()) == (status, ("", text))


def test_a_missing_extra_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mixwright", "x"])
    with pytest.raises(SystemExit) as left:
        run_at_edge(raising(MissingExtra("data", "hub data sets")))
    assert left.value.code == 1 and "pip install 'mixwright[data]'" in capsys.readouterr().err


def test_json_errors_for_machines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mixwright", "x", "--json"])
    with pytest.raises(SystemExit):
        run_at_edge(raising(IncompatibleExpert("SHAPE", "law", "too wide")))
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"code": "SHAPE", "where": "law", "message": "too wide"}} and not err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        run_at_edge(raising(RuntimeError("ours")))
    monkeypatch.setenv("MIXWRIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="theirs"):
        run_at_edge(raising(ValueError("theirs")))


def test_the_real_command_leaves_with_the_same_codes() -> None:
    done = mixwright_command("cite", "phatgoose")
    assert done.returncode == 0 and done.stdout.startswith("@inproceedings{muqeeth2024learning")
    assert mixwright_command("--version").stdout == f"{mixwright.__version__}\n"
    unknown = mixwright_command("cite", "phatgose")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "mixwright: method 'phatgose' is not known; did you mean 'phatgoose'?\n"
    assert mixwright_command("nonsense").returncode == 2
    assert "Traceback" not in mixwright_command("nonsense").stderr


def test_usage_errors_are_json_too() -> None:
    done = mixwright_command("cite", "--json")
    assert done.returncode == 2 and not done.stderr
    assert json.loads(done.stdout)["error"] == {"code": "USAGE", "where": "", "message": "Missing argument 'NAME'."}
    wrong = mixwright_command("methods", "--json", "--jsn")
    assert wrong.returncode == 2 and json.loads(wrong.stdout)["error"]["code"] == "USAGE"
    fine = mixwright_command("methods", "--json")
    assert fine.returncode == 0 and json.loads(fine.stdout)[0]["name"]
