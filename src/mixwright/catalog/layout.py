"""Which tensors of a file are which factor at which site: the names and shapes, before any value is read.

A LoRA is two tensors per site and nothing else, so that an adapter can never touch a weight of the backbone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mixwright.catalog.header import Header, TensorEntry
from mixwright.catalog.peft_config import ALL_LINEAR, LoraConfig, names
from mixwright.catalog.refusal import Faults, quote

_PREFIX = "base_model.model."
_PATH = r"(?P<path>[A-Za-z0-9_\-]+(?:\.[A-Za-z0-9_\-]+)*)"
_FACTOR = re.compile(_PATH + r"\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_\-]+))?\.weight")
_FORBIDDEN = re.compile(
    r"(^|\.)(base_layer|original_module|modules_to_save)\.|(^|\.)lora_(embedding_|magnitude_vector)"
)


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """The two factors of one site as the file declares them, and the scale of their product."""

    path: str
    rank: int
    d_in: int
    d_out: int
    scale: float
    down: TensorEntry
    up: TensorEntry


def lay_out(config: LoraConfig, header: Header, where: str) -> dict[str, SiteLayout]:
    """The sites of an adapter in the order of their paths.

    Raises CatalogError: TENSOR for tensors that are no factors of a targeted module, INCOMPLETE for half an adapter or
    none, SHAPE for factors that disagree with the rank, TARGET for names in the configuration that name no module here,
    DUP for two tensors in one role.
    """
    faults = Faults(where)
    found = _factors(header, faults)
    if not found:
        faults.add(
            "INCOMPLETE", "the file holds no LoRA factors (….lora_A.weight, ….lora_B.weight): it would do nothing."
        )
    else:
        _check_names(config, list(found), faults)
    sites = {path: site for path in sorted(found) if (site := _site(path, found[path], config, faults)) is not None}
    faults.check()
    return sites


def _factors(header: Header, faults: Faults) -> dict[str, dict[str, TensorEntry]]:
    """Site path -> side ("A", "B") -> tensor."""
    found: dict[str, dict[str, TensorEntry]] = {}
    strangers: list[str] = []
    adapters: set[str | None] = set()
    for name, entry in header.tensors.items():
        match = None if _FORBIDDEN.search(name) else _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            strangers.append(name)
            continue
        adapters.add(match["adapter"])
        sides = found.setdefault(match["path"], {})
        if match["side"] in sides:
            faults.add("DUP", f"{quote(match['path'])} has two tensors for lora_{match['side']}; one is accepted.")
        sides[match["side"]] = entry
    if len(adapters) > 1:
        faults.add("DUP", "the file holds the factors of several adapters; save each in a folder of its own.")
    for name in strangers:
        if found or _touches_backbone(name):
            message = "only lora_A and lora_B of linear layers are accepted: an adapter may not bring other weights."
            if ".base_layer." in name:  # PEFT adds it by itself when a head or an embedding is among the targets
                message = "it is the backbone's own weight. Save again with save_embedding_layers=False."
            faults.add("TENSOR", f"{quote(name)} is no LoRA factor; {message}")
    return found


def _touches_backbone(name: str) -> bool:
    return _FORBIDDEN.search(name) is not None or "lora_" not in name and name.startswith((_PREFIX, "lm_head."))


def _check_names(config: LoraConfig, paths: list[str], faults: Faults) -> None:
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    missing = [name for name in targets if name != ALL_LINEAR and not any(names(name, path) for path in paths)]
    if missing:
        listed = ", ".join(quote(name, 40) for name in missing[:4])
        faults.add(
            "TARGET", f"target_modules names {listed}, but the file adapts no such module. Correct or remove it."
        )
    for path in paths:
        if not config.adapts(path):
            faults.add(
                "TENSOR", f"{quote(path)} has factors, but target_modules does not name it. Name it or remove them."
            )
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for name in pattern:
            if not any(names(name, path) for path in paths):
                faults.add(
                    "TARGET", f"{key} names {quote(name)}, but the file adapts no such module. Correct or remove it."
                )


def _site(path: str, sides: Mapping[str, TensorEntry], config: LoraConfig, faults: Faults) -> SiteLayout | None:
    if set(sides) != {"A", "B"}:
        missing = "B" if "A" in sides else "A"
        faults.add(
            "INCOMPLETE", f"{quote(path)} has no lora_{missing}; both factors are needed. Save the adapter again."
        )
        return None
    rank, down, up = config.rank_of(path), sides["A"], sides["B"]
    for side, shape, wanted, at in (("A", down.shape, f"[{rank}, d_in]", 0), ("B", up.shape, f"[d_out, {rank}]", 1)):
        if len(shape) != 2 or shape[at] != rank or min(shape) < 1:
            message = f"{quote(path)}.lora_{side} is {list(shape)}; rank {rank} in the configuration needs {wanted}."
            faults.add("SHAPE", message)
            return None
    return SiteLayout(path, rank, down.shape[1], up.shape[0], config.scale_of(path), down, up)
