"""A PEFT adapter_config.json, read against a strict schema: each option is honoured or refused by name, none ignored.

The keys are those that any release of PEFT has written for a LoRA. A key with its default value asks for nothing and is
accepted; a feature that is asked for and not supported here is refused, because leaving it out would change the result.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mixwright.catalog.document import is_list, is_object, parse
from mixwright.catalog.refusal import Faults, quote, show

MAX_CONFIG = 256 * 1024
MAX_RANK = 512
MAX_ALPHA = 65536.0
MAX_NAMES = 4096
ALL_LINEAR = "all-linear"
_LITERAL = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_TASKS = {"SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}
_INITS = (True, False, "gaussian", "orthogonal")  # these set A and B only: the backbone is the one that was downloaded
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")

Number = TypeVar("Number", int, float)

_FEATURES: dict[str, str] = {
    "use_dora": "it rescales the backbone's weights by a magnitude. Train with use_dora=False.",
    "lora_bias": "it adds a bias to lora_B. Train with lora_bias=False.",
    "modules_to_save": "it replaces whole modules of the backbone. Train without it.",
    "trainable_token_indices": "it replaces rows of the embedding. Train without it.",
    "target_parameters": "it adapts bare parameters, not linear layers. Use target_modules.",
    "layers_to_transform": "name the layers in target_modules instead.",
    "layers_pattern": "name the layers in target_modules instead.",
    "layer_replication": "it builds another backbone out of repeated layers.",
    "alora_invocation_tokens": "it switches the adapter on by a token sequence, which routing replaces.",
    "use_qalora": "it pools the inputs of quantised layers.",
    "use_bdlora": "it stores block-diagonal factors. Convert it to plain factors.",
    "kasa_config": "it truncates the backbone's weights.",
    "arrow_config": "it is a router over further adapters. Add those adapters one by one.",
    "velora_config": "it is a variant with its own layers.",
    "monteclora_config": "it samples its weights.",
    "megatron_config": "it names code to import.",
    "loftq_config": "LoftQ changes the backbone's weights. Convert it first.",
    "eva_config": "EVA is refused with the other initialisations that read the backbone. Convert it first.",
    "corda_config": "CorDA changes the backbone's weights. Convert it first.",
    "lora_ga_config": "LoRA-GA changes the backbone's weights. Convert it first.",
    "ensure_weight_tying": "it ties adapters of tied layers to each other.",
    "enable_lora": "merged linear layers of PEFT's first releases are not read. Train with a later PEFT.",
    "merge_weights": "an adapter merged at loading would change the backbone.",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of an adapter_config.json that has an effect here."""

    rank: int
    alpha: float
    targets: tuple[str, ...] | str
    """Literal endings of module paths, or one text: "all-linear" or the path of the one module."""
    excluded: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    rslora: bool = False
    fan_in_fan_out: bool = False
    base_model: str | None = None
    task_type: str | None = None

    def rank_of(self, path: str) -> int:
        """The rank at a module."""
        return next((rank for name, rank in self.rank_pattern.items() if names(name, path)), self.rank)

    def scale_of(self, path: str) -> float:
        """alpha / rank at a module; with rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023, theorem 3.2)."""
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if names(name, path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def adapts(self, path: str) -> bool:
        """Whether PEFT would put this adapter on the linear module at `path`."""
        return targeted(path, self.targets, self.excluded)


def names(name: str, path: str) -> bool:
    """PEFT's rule for a literal name: the path itself, or its last parts."""
    return path == name or path.endswith("." + name)


def targeted(path: str, targets: tuple[str, ...] | str, excluded: tuple[str, ...] | str) -> bool:
    """Whether a linear module is named by `targets` and not by `excluded`."""
    return (targets == ALL_LINEAR or _listed(path, targets)) and not _listed(path, excluded)


def _listed(path: str, listed: tuple[str, ...] | str) -> bool:
    return path == listed if isinstance(listed, str) else any(names(name, path) for name in listed)


def read_config(data: bytes, where: str) -> LoraConfig:
    """The adapter's configuration from the bytes of adapter_config.json.

    Raises CatalogError: JSON, DUP, CONFIG (unknown keys and kinds), RANK, ALPHA, TARGET, FEATURE.
    """
    raw = parse(data, where, nan=True)
    faults = Faults(where)
    kind = raw.get("peft_type")
    if kind != "LORA":
        found = "no peft_type" if kind is None else f"peft_type {quote(kind)}"
        raise faults.stop("CONFIG", f'{found}; "LORA" is supported. Other kinds and containers cannot be added.')
    for key, value in raw.items():
        _check(key, value, faults)
    config = LoraConfig(
        rank=_rank("r", raw.get("r", 8), faults),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha", 8), faults),
        targets=_targets(raw.get("target_modules"), faults),
        excluded=_excluded(raw.get("exclude_modules"), faults),
        rank_pattern=_pattern("rank_pattern", raw.get("rank_pattern"), _rank, faults),
        alpha_pattern=_pattern("alpha_pattern", raw.get("alpha_pattern"), _alpha, faults),
        rslora=bool(raw.get("use_rslora")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        base_model=raw.get("base_model_name_or_path") or None,
        task_type=raw.get("task_type"),
    )
    faults.check()
    return config


def _check(key: str, value: Any, faults: Faults) -> None:
    if key in _FEATURES:
        if not (value is None or value is False or (isinstance(value, (str, list, dict)) and not value)):
            faults.add("FEATURE", f"{key}={_brief(value)} is not supported: {_FEATURES[key]}")
    elif key in _CHECKS:
        _CHECKS[key](key, value, faults)
    elif key not in _READ:
        near = difflib.get_close_matches(key[:64], _KNOWN, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        faults.add(
            "CONFIG", f"unknown key {quote(key)}; ignoring it could change the result.{hint} Remove it if it is inert."
        )


def _bias(key: str, value: Any, faults: Faults) -> None:
    if value is not None and value != "none":
        faults.add("FEATURE", f'{key}={_brief(value)} changes biases of the backbone; only "none" is supported.')


def _init(key: str, value: Any, faults: Faults) -> None:
    if isinstance(value, str) and value.lower().startswith(_CHANGED_BASE):
        advice = "Convert it to plain LoRA with PEFT first, and add the result."
        message = f"{key}={quote(value)} changes the base weights during training, so it would be wrong here. {advice}"
        faults.add("FEATURE", message)
    elif not (isinstance(value, (bool, str)) and value in _INITS):
        faults.add("FEATURE", f'{key}={_brief(value)} is not supported; true, false, "gaussian" and "orthogonal" are.')


def _megatron(key: str, value: Any, faults: Faults) -> None:
    if value not in (None, "megatron.core"):
        faults.add("FEATURE", f"{key}={_brief(value)} names code to import, which is never done. Remove it.")


def _flag(key: str, value: Any, faults: Faults) -> None:
    if value is not None and not isinstance(value, bool):
        faults.add("CONFIG", f"{key} is {_brief(value)}; true or false is accepted.")


def _text(key: str, value: Any, faults: Faults) -> None:
    if value is not None and not (isinstance(value, str) and len(value) <= 1024):
        faults.add("CONFIG", f"{key} is {_brief(value)}; text of at most 1024 characters or null is accepted.")


def _task(key: str, value: Any, faults: Faults) -> None:
    if value is not None and not (isinstance(value, str) and value in _TASKS):
        faults.add("CONFIG", f"{key} is {_brief(value)}; null and {', '.join(sorted(_TASKS))} are accepted.")


def _dropout(key: str, value: Any, faults: Faults) -> None:
    if type(value) not in (int, float) or not 0 <= value <= 1:  # NaN fails the comparison
        faults.add("CONFIG", f"{key} is {_brief(value)}; a number from 0 to 1 is accepted.")


def _count(key: str, value: Any, faults: Faults) -> None:
    if value is not None and type(value) is not int:
        faults.add("CONFIG", f"{key} is {_brief(value)}; a whole number is accepted.")


def _mapping(key: str, value: Any, faults: Faults) -> None:
    """auto_mapping names a class to import. It is looked at for its kind and never used."""
    if value is not None and not is_object(value):
        faults.add("CONFIG", f"{key} is {_brief(value)}; null or a mapping is accepted (and never used).")


def _rank(key: str, value: Any, faults: Faults) -> int:
    if type(value) is int and 1 <= value <= MAX_RANK:
        return value
    faults.add("RANK", f"{key} is {_brief(value)}; a whole number from 1 to {MAX_RANK} is accepted.")
    return 1


def _alpha(key: str, value: Any, faults: Faults) -> float:
    if type(value) in (int, float) and 0 < value <= MAX_ALPHA:
        return float(value)
    faults.add("ALPHA", f"{key} is {_brief(value)}; a number above 0, at most {MAX_ALPHA:g}, is accepted.")
    return 1.0


def _pattern(key: str, value: Any, read: Callable[[str, Any, Faults], Number], faults: Faults) -> dict[str, Number]:
    """rank_pattern or alpha_pattern: literal module names to numbers, in the order in which PEFT tries them."""
    if value is None:
        return {}
    if not is_object(value) or len(value) > MAX_NAMES:
        faults.add("CONFIG", f"{key} is {_brief(value)}; a mapping of at most {MAX_NAMES} names is accepted.")
        return {}
    for name in value:
        _literal(key, name, faults)
    return {name: read(f"{key}[{quote(name)}]", number, faults) for name, number in value.items()}


def _targets(value: Any, faults: Faults) -> tuple[str, ...] | str:
    """A list of literal names, or one text, which PEFT reads as a pattern over the whole path."""
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    if value in (None, []):
        faults.add("TARGET", f"target_modules is {_brief(value)}; a list of module names is needed.")
    return _listing("target_modules", value, faults)


def _excluded(value: Any, faults: Faults) -> tuple[str, ...] | str:
    return _listing("exclude_modules", value, faults)


def _listing(key: str, value: Any, faults: Faults) -> tuple[str, ...] | str:
    if value is None or (is_list(value) and not value):
        return ()
    if isinstance(value, str):
        _literal(key, value, faults)
        return value
    if not is_list(value) or len(value) > MAX_NAMES:
        faults.add("TARGET", f"{key} is {_brief(value)}; a list of at most {MAX_NAMES} module names is accepted.")
        return ()
    for name in value:
        _literal(key, name, faults)
    return tuple(name for name in value if isinstance(name, str))


def _literal(key: str, name: Any, faults: Faults) -> None:
    if not (isinstance(name, str) and len(name) <= 512 and _LITERAL.fullmatch(name)):
        advice = "literal module names are accepted, no patterns: letters, digits, _ and - between dots. List them."
        faults.add("TARGET", f"{key} holds {_brief(name)}; {advice}")


def _brief(value: Any) -> str:
    return quote(value) if isinstance(value, str) else show(value)


_CHECKS: dict[str, Callable[[str, Any, Faults], None]] = {
    "bias": _bias,
    "init_lora_weights": _init,
    "megatron_core": _megatron,
    "task_type": _task,
    "lora_dropout": _dropout,
    "auto_mapping": _mapping,
    "qalora_group_size": _count,
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "inference_mode"), _flag),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), _text),
}
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
_KNOWN = sorted({*_FEATURES, *_CHECKS, *_READ})
