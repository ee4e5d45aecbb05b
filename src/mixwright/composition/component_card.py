"""The model card of a composition made of several models: each with its licence, and what they ask together."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixwright.catalog.licence_terms import WORDS
from mixwright.catalog.licences import NOT_LEGAL_ADVICE
from mixwright.composition.card import cited, plain
from mixwright.composition.ledger import LEDGER, NOTICE, Entry, Ledger
from mixwright.yaml12 import write_yaml

if TYPE_CHECKING:
    from mixwright.composition.model import Composition
    from mixwright.composition.saving import StoredComponent, StoredComposition


def components_card(stored: "StoredComposition", composition: "Composition", ledger: Ledger) -> str:
    """The text of README.md: hub metadata with every base model, the components, their licences, how to load it."""
    named = " and ".join(plain(component.name) for component in stored.components)
    lines = [
        f"---\n{write_yaml(_metadata(stored, ledger))}---",
        "",
        f"# {plain(stored.method)}: {named}",
        "",
        f"One language model out of {len(stored.components)}, made with mixwright by the method "
        f"*{plain(stored.method)}*.",
        "",
        "```python",
        "import mixwright as mw",
        "",
        'model = mw.load("this-folder-or-repository")',
        "```",
        "",
        "## Components",
        "",
        "| name | architecture | from | weights | acts at | licence | claim read in |",
        "|---|---|---|---|---|---|---|",
        *(_row(*both) for both in zip(stored.components, ledger.entries)),
        "",
        "## Licences",
        "",
        f"Together: `{plain(ledger.expression.spdx)}`. What is asked of whoever passes this model on:",
        "",
        *(f"- {duty}: {WORDS[duty]} ({_askers(ledger, duty)})" for duty in ledger.duties),
        *_conflicts(ledger),
        "",
        f"`{LEDGER}` has every claim with its source, `{NOTICE}` the attributions. This is what was found, "
        f"{NOT_LEGAL_ADVICE}.",
        "",
        "## Settings",
        "",
        *(f"- `{plain(key)}`: {plain(value)}" for key, value in stored.config.items() if value is not None),
    ]
    return cited(lines, composition)


def on_hub(path: str) -> bool:
    """Whether a path is a hub id, and no folder that happens to be written like one."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()


def _metadata(stored: "StoredComposition", ledger: Ledger) -> dict[str, Any]:
    bases = list(dict.fromkeys(c.backbone.path for c in stored.components if on_hub(c.backbone.path)))
    merged = {"base_model": bases, "base_model_relation": "merge"} if bases else {}
    tags = ["mixwright", stored.method, "hybrid", "merge"]
    return {"library_name": "mixwright", "tags": tags, **ledger.metadata(), **merged}


def _row(component: "StoredComponent", entry: Entry) -> str:
    place = plain(component.backbone.path) if on_hub(component.backbone.path) else "a local folder"
    if not component.backbone.path:
        place = "built in memory"
    if component.backbone.revision:
        place += f" @ {plain(component.backbone.revision)[:12]}"
    kept = f"in `{component.folder}`" if component.folder else "as pretrained"
    cells = (
        component.name,
        component.backbone.architecture,
        place,
        kept,
        ", ".join(entry.component.used) or "nowhere",
        entry.licence.expression.spdx,
        entry.licence.source,
    )
    return "| " + " | ".join(plain(cell) if cell is not kept else cell for cell in cells) + " |"


def _askers(ledger: Ledger, duty: str) -> str:
    return ", ".join(plain(entry.component.name) for entry in ledger.entries if duty in entry.duties)


def _conflicts(ledger: Ledger) -> Sequence[str]:
    found = [f"- {plain(conflict.why)}" for conflict in ledger.conflicts]
    return ["", "These licences do not go together:", "", *found] if found else []
