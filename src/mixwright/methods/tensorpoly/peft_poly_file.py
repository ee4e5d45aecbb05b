"""A folder that PEFT's Poly wrote, read as the catalogue reads adapters: each option is honoured or refused by name.

Of one linear layer there are `poly_lora_A` (n_splits, n_skills, d_in / n_splits, r), `poly_lora_B` (n_splits, n_skills,
r, d_out / n_splits) and `poly_router.module_logits` (n_tasks, n_splits * n_skills).
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mixwright.catalog.adapter import build_tensor
from mixwright.catalog.bundle import check_present, read_tensors
from mixwright.catalog.card import CONFIG, WEIGHTS
from mixwright.catalog.document import is_list, parse
from mixwright.catalog.folder import open_folder
from mixwright.catalog.header import Header, TensorEntry
from mixwright.catalog.peft_config import MAX_CONFIG, MAX_NAMES, MAX_RANK, targeted
from mixwright.catalog.refusal import Faults, quote, show

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
_PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<path>[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*)\.(?P<part>poly_lora_[AB]|poly_router\.module_logits)"
)
_LITERAL = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_COUNTS = {"r": (8, MAX_RANK), "n_tasks": (1, 1 << 20), "n_skills": (4, 1 << 12), "n_splits": (1, 1 << 12)}
_INERT = (
    "auto_mapping",
    "inference_mode",
    "init_weights",
    "peft_version",
    "revision",
    "task_type",
    "base_model_name_or_path",
)
_READ = ("peft_type", "poly_type", "modules_to_save", "target_modules", "exclude_modules", *_COUNTS)


@dataclass(frozen=True, slots=True, eq=False)
class PolyAdapter:
    """What a folder of PEFT's Poly holds; `sites` gives A, B and the logits of each layer, in float32."""

    rank: int
    num_tasks: int
    num_skills: int
    num_splits: int
    base_model: str | None
    targets: tuple[str, ...]
    excluded: tuple[str, ...]
    sites: dict[str, tuple[Tensor, Tensor, Tensor]]

    def adapts(self, path: str) -> bool:
        """Whether PEFT would put this adapter on the linear layer at `path`."""
        return targeted(path, self.targets, self.excluded)


def read_poly(folder: Path, where: str) -> PolyAdapter:
    """Read and check such a folder. Raises CatalogError with the code of what is wrong, further faults as its notes."""
    with open_folder(folder, where) as opened:
        check_present(opened.names(), where)
        raw = parse(opened.read(CONFIG, MAX_CONFIG), where)
        counts, targets, excluded = _read_config(raw, where)
        laid_out: dict[str, dict[str, TensorEntry]] = {}

        def lay(header: Header) -> None:
            laid_out.update(_lay_out(header, counts, targets, excluded, where))

        data, header = read_tensors(opened, WEIGHTS, lay)
    faults = Faults(where)
    sites = {
        path: (
            build_tensor(data, header, parts[A], faults),
            build_tensor(data, header, parts[B], faults),
            build_tensor(data, header, parts[LOGITS], faults),
        )
        for path, parts in sorted(laid_out.items())
    }
    faults.check()
    base = raw.get("base_model_name_or_path")
    rank, num_tasks, num_skills, num_splits = (counts[name] for name in _COUNTS)
    return PolyAdapter(rank, num_tasks, num_skills, num_splits, base or None, targets, excluded, sites)


def _read_config(raw: Mapping[str, Any], where: str) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    faults = Faults(where)
    if raw.get("peft_type") != "POLY":
        raise faults.stop("CONFIG", f'peft_type is {quote(raw.get("peft_type"))}; "POLY" is read here.')
    if raw.get("poly_type", "poly") != "poly":
        message = 'PEFT itself knows "poly" only. Save the adapter with that type.'
        faults.add("FEATURE", f"poly_type={quote(raw['poly_type'])} is not supported: {message}")
    if raw.get("modules_to_save"):
        message = "it replaces whole modules of the backbone. Train without it."
        faults.add("FEATURE", f"modules_to_save={show(raw['modules_to_save'])} is not supported: {message}")
    for key in raw:
        if key not in _READ and key not in _INERT:
            near = difflib.get_close_matches(key[:64], (*_READ, *_INERT), 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            faults.add("CONFIG", f"unknown key {quote(key)}; ignoring it could change the result.{hint}")
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        faults.add("CONFIG", f"base_model_name_or_path is {show(base)}; text or null is accepted.")
    counts = {key: _count(key, raw.get(key, default), most, faults) for key, (default, most) in _COUNTS.items()}
    targets = _names("target_modules", raw.get("target_modules"), faults)
    excluded = _names("exclude_modules", raw.get("exclude_modules") or [], faults)
    faults.check()
    return counts, targets, excluded


def _count(key: str, value: Any, most: int, faults: Faults) -> int:
    if type(value) is int and 1 <= value <= most:
        return value
    faults.add(
        "RANK" if key == "r" else "CONFIG", f"{key} is {show(value)}; a whole number from 1 to {most} is accepted."
    )
    return 1


def _names(key: str, value: Any, faults: Faults) -> tuple[str, ...]:
    if not is_list(value) or len(value) > MAX_NAMES:
        faults.add("TARGET", f"{key} is {show(value)}; a list of module names is accepted, no pattern. List them.")
        return ()
    for name in value:
        if not (isinstance(name, str) and _LITERAL.fullmatch(name)):
            faults.add("TARGET", f"{key} holds {quote(name)}; literal module names are accepted, no patterns.")
    return tuple(name for name in value if isinstance(name, str))


def _lay_out(
    header: Header, counts: Mapping[str, int], targets: tuple[str, ...], excluded: tuple[str, ...], where: str
) -> dict[str, dict[str, TensorEntry]]:
    """Site -> part -> tensor, every one of the shape that the configuration says."""
    faults, found = Faults(where), dict[str, dict[str, TensorEntry]]()
    for name, entry in header.tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            faults.add("TENSOR", f"{quote(name)} is no part of a Poly layer; an adapter may not bring other weights.")
        else:
            found.setdefault(match["path"], {})[match["part"]] = entry
    if not found:
        faults.add("INCOMPLETE", f"the file holds no Poly layer (….{A}, ….{B}, ….{LOGITS}): it would do nothing.")
    for name in targets:
        if not any(targeted(path, (name,), ()) for path in found):
            faults.add("TARGET", f"target_modules names {quote(name)}, but the file adapts no such module. Correct it.")
    for path, parts in found.items():
        if not targeted(path, targets, excluded):
            faults.add("TENSOR", f"{quote(path)} has tensors, but target_modules does not name it. Name it.")
        _check_site(path, parts, counts, faults)
    faults.check()
    return found


def _check_site(path: str, parts: Mapping[str, TensorEntry], counts: Mapping[str, int], faults: Faults) -> None:
    missing = [part for part in (A, B, LOGITS) if part not in parts]
    if missing:
        faults.add("INCOMPLETE", f"{quote(path)} has no {missing[0]}; all three tensors are needed. Save it again.")
        return
    rank, tasks, skills, splits = (counts[name] for name in _COUNTS)
    a, b = parts[A].shape, parts[B].shape
    wanted: dict[str, tuple[int, ...]] = {
        A: (splits, skills, a[2] if len(a) == 4 else 0, rank),
        B: (splits, skills, rank, b[3] if len(b) == 4 else 0),
        LOGITS: (tasks, splits * skills),
    }
    for part, shape in wanted.items():
        if parts[part].shape != shape:
            expected = str(list(shape)).replace(" 0", " any")
            faults.add(
                "SHAPE", f"{quote(path)}.{part} is {list(parts[part].shape)}; the configuration needs {expected}."
            )
