"""A card finds its method's files beside its config, and says what its method lacks."""

import sys
from pathlib import Path

import pytest

from mixwright.methods.base import Method, load

CONFIG = "class Config:\n    pass\n"


@pytest.fixture
def lone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    folder = tmp_path / "lone_method"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "config.py").write_text(CONFIG)
    (folder / "recipe.py").write_text("def stages(config):\n    return ('own', config)\n")
    (folder / "stored.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    from lone_method.config import Config  # type: ignore[import-not-found]

    yield Method(name="lone", summary="s", config=Config, paper=load("peer").paper)
    for module in [name for name in sys.modules if name.startswith("lone_method")]:
        del sys.modules[module]


def test_what_the_folder_has_is_called(lone: Method) -> None:
    assert lone.stages(3) == ("own", 3)


def test_what_it_lacks_is_said_and_what_is_broken_is_not_hidden(lone: Method) -> None:
    with pytest.raises(NotImplementedError, match="lone does not compose"):
        lone.compose(None, [])
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        lone.restore(None, None, {}, ())  # type: ignore[arg-type]
