"""What verbs on a finished composition share: opening one, with its tokenizer, and reading the text it is given."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mixwright.composition.model import ComposedModel

Folder = Annotated[Path, typer.Argument(metavar="COMPOSITION", help="A folder that `mixwright compose` wrote.")]
Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone", help="Where the backbone lies now, if not where it lay at `compose`; several by comma, in order."
    ),
]

Task = Annotated[
    str | None, typer.Option("--task", help="Name or number of the task, for a composition that is routed by task.")
]

_TOKENIZER = "tokenizer_config.json"


def opened(folder: Path, backbone: str | None) -> tuple["ComposedModel", Any]:
    """The composed model in a folder, and its tokenizer."""
    model = loaded(folder, backbone)
    return model, tokenizer_in(folder, model, backbone)


def loaded(folder: Path, backbone: str | None) -> "ComposedModel":
    """The composed model in a folder. `backbone` may name several by comma."""
    from mixwright.api import load

    several = backbone is not None and "," in backbone and not Path(backbone).exists()
    return load(folder, backbone=backbone.split(",") if backbone is not None and several else backbone)


def tokenizer_in(folder: Path, model: "ComposedModel", backbone: str | None) -> Any:
    """The tokenizer that lies with a composition, or beside its backbone. Raises ValueError where neither is known."""
    from mixwright.backbones.hf import load_tokenizer

    if (folder / _TOKENIZER).is_file():
        return load_tokenizer(folder)
    recorded = model.composition.backbone
    home = backbone or str(recorded.get("path") or "")
    if not home:
        raise ValueError(f"{folder} does not say where its backbone lies; give --backbone FOLDER.")
    return load_tokenizer(home, revision=None if backbone else recorded.get("revision"))


def text_of(option: str, text: str | None, file: str | None) -> str:
    """The text that was given, or what a file holds; `-` is standard input. Raises ValueError for both or neither."""
    if (text is None) == (file is None):
        raise ValueError(f"give one of {option} TEXT and --file FILE (- is standard input).")
    if text is not None:
        return text
    if file == "-":
        return sys.stdin.read()
    try:
        return Path(str(file)).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}).") from None
