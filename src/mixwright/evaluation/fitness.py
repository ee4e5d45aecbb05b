"""Is a model fit to have its weights chosen by support sets: ties, norms, features, and what it would cost."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixwright.backbones.eval_mode import eval_mode
from mixwright.backbones.image_settings import own_settings
from mixwright.composition.features import FeatureExtractor, Features
from mixwright.composition.inputs import example_inputs
from mixwright.composition.rollback import Rollback
from mixwright.experts.maskable import maskable
from mixwright.ops.digest import tensor_digest

Level = Literal["good", "remark", "bad"]
_GIB = 2**30
_STEP_PASSES = 6
"""Passes of an episode that a step takes, a backward counted as two: frozen, student, its gradient, teacher, inner."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it stands, and what that means."""

    name: str
    level: Level
    text: str


@dataclass(frozen=True)
class Fitness:
    """What was found of a model, with the bytes and seconds that a pool of `experts` on it would take."""

    architecture: str
    library: str
    weights: int
    experts: int
    findings: tuple[Finding, ...]
    bytes: Mapping[str, int]
    seconds_per_item: float | None

    @property
    def verdict(self) -> str:
        """fit, fit with remarks, or not fit."""
        levels = {finding.level for finding in self.findings}
        return "not fit" if "bad" in levels else "fit, with remarks" if "remark" in levels else "fit"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, verdict included."""
        return {"verdict": self.verdict, **asdict(self)}


def fitness(model: nn.Module, *, experts: int = 8, features: Features = "auto", inputs: Any = None) -> Fitness:
    """Look at a model and try it out; it is left as it was.

    `inputs`: a small batch, where the model's config does not say what one looks like.
    """
    chosen = _changeable(model)
    total = sum(shape.numel() for shape in chosen.values())
    findings = [_weights(model, chosen), _ties(model), _norms(model)]
    given = _inputs(model) if inputs is None else inputs
    seconds = None
    if total and given is not None:
        tried, seconds = _tried(model, features, given, list(chosen))
        findings += tried
    elif given is None:
        said = "its config does not say what its inputs look like; compose with feature_width=, and try it out."
        findings.append(Finding("features", "remark", said))
    known = getattr(model, "config", None)
    library = "transformers" if known is not None and hasattr(model, "save_pretrained") else "plain torch"
    return Fitness(
        architecture=type(model).__name__,
        library=library if own_settings(model) is None else "timm",
        weights=total,
        experts=experts,
        findings=tuple(findings),
        bytes=memory_of(model, total, experts),
        seconds_per_item=seconds,
    )


def memory_of(model: nn.Module, weights: int, experts: int) -> dict[str, int]:
    """Bytes, counted: of the model, of meta-tuning without activations, of serving, and of a saved pool at most."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    pool = 4 * weights * (experts + 1)
    return {
        "backbone": held,
        "meta-tuning: change, masks, their gradients, momentum, one adaptation": held + 2 * pool + 8 * weights,
        "serving: change, masks, one adaptation": held + pool + 4 * weights,
        "a saved pool, exact, at most": weights // 8 + pool + weights * experts // 4,
    }


def _changeable(model: nn.Module) -> dict[str, torch.Size]:
    try:
        return maskable(model)
    except ValueError:
        return {}


def _weights(model: nn.Module, chosen: Mapping[str, torch.Size]) -> Finding:
    others = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        return Finding("weights", "bad", f"{len(absent)} parameters are not loaded ({absent[0]}, ...).")
    if not chosen:
        return Finding("weights", "bad", "no parameter holds floating-point numbers, so none can change.")
    if others:
        said = f"{len(others)} parameters hold no floating-point numbers ({others[0]}, ...) and can't change."
        return Finding("weights", "remark", said)
    total = sum(shape.numel() for shape in chosen.values())
    return Finding("weights", "good", f"{total:,} in {len(chosen)} tensors may change.")


def _ties(model: nn.Module) -> Finding:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [" = ".join(alike) for alike in names.values() if len(alike) > 1]
    if not tied:
        return Finding("tied weights", "good", "none.")
    return Finding("tied weights", "good", f"{'; '.join(tied[:3])}: masked, changed and counted once.")


def _norms(model: nn.Module) -> Finding:
    counts: dict[str, int] = {}
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    batch = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]  torch's own common base
    if any(module.running_mean is None for module in batch):
        said = f"{listed}. BatchNorm without running statistics looks at the whole batch: queries would see each other."
        return Finding("norms", "bad", said)
    if batch:
        said = (
            f"{listed}. Running statistics stay as pretrained (evaluation mode throughout); weight and bias may change."
        )
        return Finding("norms", "remark", said)
    return Finding("norms", "good", f"{listed}; nothing depends on the rest of a batch.")


def _inputs(model: nn.Module) -> Any:
    found = example_inputs(model)
    if found is None:
        return None
    return found if "input_ids" in found else next(iter(found.values()))


def _tried(model: nn.Module, kind: Features, inputs: Any, names: list[str]) -> tuple[list[Finding], float | None]:
    """Features, twice; then under other weights in two ways, which must agree; and what a pass takes."""
    extractor, before = FeatureExtractor(model, kind), tensor_digest(model)
    try:
        with eval_mode(model):
            first = extractor(inputs)
            started = time.perf_counter()
            second = extractor(inputs)
            seconds = (time.perf_counter() - started) / len(first)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        return [Finding("features", "bad", f"it can't be tried out: {str(error).splitlines()[0][:200]}")], None
    if first.dim() != 2 or not bool(first.isfinite().all()):
        said = f"features {kind!r} are {tuple(first.shape)}, or not finite; expected (items, width). Give a function."
        return [Finding("features", "bad", said)], None
    found = [Finding("features", "good", f"{kind!r}: {first.shape[1]} numbers for each item.")]
    same = torch.equal(first, second)
    found.append(
        Finding("determinism", "good", "two passes give the same bits.")
        if same
        else Finding("determinism", "bad", "two passes in evaluation differ: something draws at random.")
    )
    found.append(
        _both_ways(model, extractor, inputs, names) if same else Finding("replacing weights", "remark", "not tried.")
    )
    unchanged = tensor_digest(model) == before
    found.append(
        Finding("left alone", "good", "after all this every parameter and buffer has its bits.")
        if unchanged
        else Finding("left alone", "bad", "a pass in evaluation changes the model's own tensors.")
    )
    return found, seconds


def _both_ways(model: nn.Module, extractor: FeatureExtractor, inputs: Any, names: list[str]) -> Finding:
    """functional_call under other weights against the same weights in place."""
    draw, known = torch.Generator().manual_seed(0), dict(model.named_parameters())
    other: dict[str, Tensor] = {}
    for name in names:
        noise = torch.randn(known[name].shape, generator=draw).to(known[name]) * 1e-3
        other[name] = known[name].detach() + noise
    try:
        with eval_mode(model):
            replaced = functional_call(extractor, {f"backbone.{name}": t for name, t in other.items()}, (inputs,))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        return Finding("replacing weights", "bad", f"functional_call fails: {str(error).splitlines()[0][:200]}")
    rollback = Rollback(model)
    rollback.apply(other)
    try:
        with eval_mode(model):
            in_place = extractor(inputs)
    finally:
        rollback.undo()
    if torch.equal(replaced, in_place):
        return Finding("replacing weights", "good", "for one pass and in place come to the same bits.")
    gap = float((replaced - in_place).abs().max())
    level: Level = "bad" if gap > 1e-3 * float(in_place.abs().max()) else "remark"
    return Finding("replacing weights", level, f"for one pass and in place differ by up to {gap:.2g}.")


def cost_lines(found: Fitness) -> list[tuple[str, str]]:
    """What a pool would cost, in words."""
    lines = [(name, f"{number / _GIB:.2f} GiB") for name, number in found.bytes.items()]
    if found.seconds_per_item is not None:
        pass_ms = 1e3 * found.seconds_per_item
        lines.append(("one pass of one item, here", f"{pass_ms:.1f} ms"))
        lines.append(("a meta-tuning step of 100 items, about", f"{_STEP_PASSES * pass_ms / 10:.1f} s"))
    return lines
