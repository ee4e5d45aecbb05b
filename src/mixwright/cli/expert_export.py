"""`experts export`: a task of a composition for those who have no router, as a PEFT LoRA or as merged weights."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixwright.cli.composition import Backbone, Folder, opened
from mixwright.cli.output import Json, console, example, print_json

if TYPE_CHECKING:
    from mixwright.composition.exporting import Exported

EXAMPLE = example(
    "mixwright experts export composed rte --output rte-lora",
    "mixwright experts export composed rte --output rte-model --merged",
    "mixwright experts export composed --all --output loras",
)


def export(
    composition: Folder,
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="Name or number of a task; none where nothing depends on it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write, which must be new or empty.")
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write the backbone with the task in its weights, not a LoRA.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Write every task, each into a folder of its name.")] = False,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Write a task as an ordinary PEFT LoRA, which PEFT and vLLM load and `experts add` takes, or as merged weights.

    Both act exactly as the composition does under that task. Nothing is learned and no text is needed.
    """
    from mixwright.composition.by_task import of_task, task_names
    from mixwright.composition.exporting import export_lora, export_merged

    if output is None:
        raise ValueError("say where it goes: --output FOLDER.")
    if every and task is not None:
        raise ValueError(f"--all writes every task; leave {task!r} out, or leave --all out.")
    model, tokenizer = opened(composition, backbone)
    if every and not task_names(model):
        raise ValueError(f"{composition} knows no tasks; leave --all out.")
    places = {name: output / _folder(name) for name in task_names(model)} if every else {task: output}
    written: list[tuple[str | None, Exported]] = []
    for name, folder in places.items():
        condition = of_task(model, name)
        if merged:
            written.append((name, export_merged(model, condition, folder, tokenizer)))
        else:
            written.append((name, export_lora(model, condition, folder, name or composition.name)))
    if as_json:
        print_json({"merged": merged, "exported": [{"task": name, **asdict(each)} for name, each in written]})
        return
    for name, each in written:
        what = "merged weights" if merged else f"a LoRA of rank {each.rank}"
        line = f"{each.folder}: {name or composition.name}, {what}, {each.sites} sites, {each.numbers:,} numbers"
        console().print(line, markup=False, soft_wrap=True)


def _folder(task: str) -> str:
    """A task's name, where it can be that of a folder."""
    from mixwright.catalog.card import check_id
    from mixwright.errors import CatalogError

    try:
        return check_id(task)
    except CatalogError as error:
        raise ValueError(f"task {task!r} can't be the name of a folder; export it by itself with --output.") from error
