"""What all tests share: no deadline for generated examples on a busy machine, the same examples every time, and nothing
compiled behind a test's back."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("MIXWRIGHT_KERNELS", "off")
settings.register_profile("house", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("house")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The compiled functions, built once for all workers; whoever asks for them is skipped without a C compiler."""
    from mixwright.ops import kernels

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    try:
        return kernels.load("auto", folder)
    except kernels.KernelUnavailable as reason:
        pytest.skip(str(reason))


@dataclass
class Hub:
    """Takes uploads and says what came."""

    calls: list[tuple[str, Any]] = field(default_factory=list[tuple[str, Any]])

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", (repo_id, options)))

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
        self.calls.append(("upload", (repo_id, sorted(os.listdir(folder_path)), options)))
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of benchmarks, which a source distribution has not, freshly on the path."""
    root = Path(__file__).parents[1]
    if not (root / "benchmarks").exists():
        pytest.skip("a source distribution has no benchmarks")
    monkeypatch.syspath_prepend(str(root))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
