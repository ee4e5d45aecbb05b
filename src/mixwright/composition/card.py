"""The model card of a composition: what it is made of, under which licences, and how good it was measured to be."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixwright.yaml12 import write_yaml

if TYPE_CHECKING:
    from mixwright.composition.model import Composition
    from mixwright.composition.saving import StoredComposition


def card_text(stored: "StoredComposition", composition: "Composition", described: Sequence[str] = ()) -> str:
    """The text of README.md: hub metadata, the parts with their licences, how to load it, what to cite.

    `described`: what a model says of itself (`ComposedModel.card_lines`), where its experts are of its own making.

    A composition whose experts were trained in it, on named tasks, lists these tasks; it has no experts of a catalogue.
    """
    experts, tasks = composition.experts, _tasks(stored)
    name = stored.backbone.path or stored.backbone.architecture
    revision = f" at `{stored.backbone.revision}`" if stored.backbone.revision else ""
    unnamed = not stored.pool  # experts that go by number, such as neurons
    counted = f"{plain(stored.method)}: {len(tasks)} tasks" if tasks else f"{len(stored.pool)} experts"
    count = plain(stored.method) if unnamed else counted
    lines = [
        f"---\n{write_yaml(_metadata(stored, experts, own=bool(described)))}---",
        "",
        f"# {count} on {plain(name)}",
        "",
        f"A composition made with mixwright by the method *{plain(stored.method)}*. The backbone, "
        f"`{plain(name)}`{revision}, is not in this folder; its fingerprint is `{stored.backbone.fingerprint}`.",
        "",
        "```python",
        "import mixwright as mw",
        "",
        'model = mw.load("this-folder-or-repository")',
        *_with_task(tasks),
        "```",
        "",
        *described,
        *(_tasks_text(stored, tasks) if tasks else ()),
        *(_experts_text(experts) if experts else ()),
        *(_unnamed_text(stored) if unnamed else ()),
        "## Settings" if unnamed else "## Routing",
        "",
        *(f"- `{plain(key)}`: {_listed(value)}" for key, value in stored.config.items() if key != "tasks"),
    ]
    return cited(lines, composition)


def _listed(value: Any) -> str:
    """A setting, written the same before and after it was in a file, where tuples become lists."""
    return plain(", ".join(map(_listed, value)) or "none" if isinstance(value, list | tuple) else _as_read(value))


def _as_read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_read(one) for key, one in value.items()}
    return [_as_read(one) for one in value] if isinstance(value, list | tuple) else value


def _tasks(stored: "StoredComposition") -> list[str]:
    named = stored.config.get("tasks")
    return [str(task) for task in named] if isinstance(named, list | tuple) else []


def _with_task(tasks: Sequence[str]) -> list[str]:
    return [f"with model.with_task({json.dumps(plain(tasks[0]))}):", "    outputs = model(**inputs)"] if tasks else []


def _tasks_text(stored: "StoredComposition", tasks: Sequence[str]) -> list[str]:
    return [
        "## Tasks",
        "",
        f"{len(stored.pool)} latent experts were trained in this composition, together on these tasks:",
        "",
        *(f"- {plain(task)}" for task in tasks),
        "",
        f"Their licence: {plain(_own_licence(stored) or 'not stated')}. Those of the backbone and of the texts may "
        "bind as well.",
        "",
    ]


def _unnamed_text(stored: "StoredComposition") -> list[str]:
    return [
        f"Its experts are part of it: they were made for this backbone, have no names and go by number. Their licence: "
        f"{plain(_own_licence(stored) or 'not stated')}. Those of the backbone and of the texts may bind as well.",
        "",
    ]


def _own_licence(stored: "StoredComposition") -> str | None:
    """Of experts that were trained in the composition."""
    return stored.config.get("licence") or None


def _experts_text(experts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "## Experts",
        "",
        "| id | task | licence | source | gain over the backbone |",
        "|---|---|---|---|---|",
        *(_row(expert) for expert in experts),
        "",
        "The licence of every part applies to what it contributes. `experts.lock.json` has the SHA-256 of every file.",
        "",
    ]


def adapter_card(title: str, backbone: Mapping[str, Any], composition: "Composition") -> str:
    """The text of README.md for one routing of a composition that was written as a PEFT adapter."""
    path = str(backbone.get("path") or "")
    base = f"`{plain(path or backbone.get('architecture', 'the backbone'))}`"
    metadata: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "mixwright", composition.method]}
    lines = [
        f"---\n{write_yaml(metadata | _on_hub(path))}---",
        "",
        f"# {plain(title)}",
        "",
        f"An ordinary LoRA for {base} (fingerprint `{backbone['fingerprint']}`), which acts exactly as a composition "
        f"made with mixwright by the method *{plain(composition.method)}* does under this one routing. Its factors "
        "hold the routing weights; no router is needed.",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(backbone, "this-folder-or-repository")',
        "```",
    ]
    return cited(lines, composition)


def cited(lines: Sequence[str], composition: "Composition") -> str:
    """The text of a card of these lines, and whom to cite."""
    source = composition.citation.strip()
    ending = ["", "## Citation", "", "```bibtex", source, "```"] if composition.citation else []
    return "\n".join([*lines, *ending]) + "\n"


def _on_hub(path: str) -> dict[str, Any]:
    """The hub's metadata of what stands on a backbone, where its path is a hub id."""
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        return {}
    return {"base_model": path, "base_model_relation": "adapter"}


def _metadata(stored: "StoredComposition", experts: Sequence[Mapping[str, Any]], own: bool) -> dict[str, Any]:
    said = _own_licence(stored)
    licences = {str(expert.get("licence") or "unknown") for expert in experts} | ({said} if said else set[str]())
    metadata: dict[str, Any] = {
        "library_name": "mixwright",
        "tags": ["mixwright", stored.method, "mixture-of-experts", *(["lora"] if stored.pool and not own else [])],
    }
    if licences or (stored.pool and not own and not _tasks(stored)):
        metadata["license"] = licences.pop().lower() if len(licences) == 1 else "other"
    return metadata | _on_hub(stored.backbone.path)


def _row(expert: Mapping[str, Any]) -> str:
    source = expert.get("source") or {}
    place = plain(source.get("name", "")) if source.get("kind") != "folder" else "a local folder"
    if source.get("revision"):
        place += f" @ {plain(source['revision'])[:12]}"
    cells = (
        expert.get("id", ""),
        expert.get("task") or "",
        expert.get("licence") or "not stated",
        place,
        _gain(expert),
    )
    return "| " + " | ".join(plain(cell) for cell in cells) + " |"


def _gain(expert: Mapping[str, Any]) -> str:
    gain = (expert.get("quality") or {}).get("gain") or {}
    if "value" not in gain:
        return "not measured"
    interval = f" ({gain['low']:.3f} to {gain['high']:.3f})" if {"low", "high"} <= set(gain) else ""
    return f"{gain['value']:.3f} nats per token{interval}"


def plain(text: Any) -> str:
    """One line of text that is no markup: it comes from third parties."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:200]
    return line.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
