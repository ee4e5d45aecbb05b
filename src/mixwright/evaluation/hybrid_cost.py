"""What a hybrid costs beside its components: numbers that are held, and operations of one pass, counted as it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mixwright.composition.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.evaluation.hybrid_documents import Documents
from mixwright.evaluation.hybrid_rows import Row
from mixwright.evaluation.operations import counted

_TOKENS = 128


def cost_lines(model: ComposedModel, rows: list[Row], documents: Documents | None) -> list[tuple[str, str, str]]:
    """What, how much, remark. Operations are counted on one row of the texts, where there are texts.

    What a model says of its own cost (`offered`) comes after what is counted here.
    """
    backbone: Any = model.backbone
    sizes = {name: _held(component) for name, component in zip(model.experts, backbone.components, strict=True)}
    live = [name for m, name in enumerate(model.experts) if any(row.weights[m] > 0 for row in rows)]
    lines = [
        (f"Parameters of {name}", f"{size:,}", _where(model, rows, m)) for m, (name, size) in enumerate(sizes.items())
    ]
    together = sum(sizes[name] for name in live)
    lines += [
        ("Added by the hybrid", f"{model.num_added_parameters():,}", "projectors and mixture weights"),
        (
            "Parameters of components that act",
            f"{together:,}",
            f"{', '.join(live)}; whole models, unused layers included",
        ),
    ]
    lines += [] if documents is None else _operations(model, documents, live)
    own = offered(model)
    return lines if own is None else [*lines, *own().lines()]


def offered(model: ComposedModel) -> Callable[[], Any] | None:
    """The model's `cost`, if it has one: what it returns has `lines`, (what, how much, remark)."""
    return getattr(model, "cost", None)


def _held(component: Any) -> int:
    return sum(parameter.numel() for parameter in component.parameters())


def _where(model: ComposedModel, rows: list[Row], m: int) -> str:
    acting = sum(len(row.slots) for row in rows if row.weights[m] > 0)
    return f"acts in {acting} of {len(model.mixtures)} places" if acting else "acts nowhere"


def _operations(model: ComposedModel, documents: Documents, live: list[str]) -> list[tuple[str, str, str]]:
    """Of one row by itself, so that the count is of a known length: per token, of the hybrid and each component."""
    inputs = {name: tensor[:1, :_TOKENS] for name, tensor in documents.batches[0].inputs.items()}
    device = next(model.backbone.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    length = next(iter(inputs.values())).shape[1]
    whole = _count(model, inputs, model.replaced())
    alone = {name: _count(model, inputs, model.only(name)) for name in live}
    remark = f"counted in one pass over {length} tokens, matrix products and all else"
    lines = [("Operations per token, hybrid", _short(whole / length), remark)]
    lines += [(f"Operations per token, {name} alone", _short(found / length), "") for name, found in alone.items()]
    total = sum(alone.values())
    if len(alone) > 1 and total:
        lines.append(("Hybrid over the sum of its components", f"{whole / total:.2f}", "operations, not time"))
    return lines


def _count(model: ComposedModel, inputs: dict[str, Tensor], guise: AbstractContextManager[Any]) -> int:
    with eval_mode(model), guise, counted({}) as found:
        model(**inputs, use_cache=False)
    return sum(found.products.values()) + sum(found.elementwise.values())


def _short(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
