"""A text of an unknown task: routed like the tasks whose texts it resembles, and uniformly where it resembles none.

Per task the mean of the bare backbone's features is remembered. Features are centred at the mean of these means, since
those of one backbone all point the same way, and compared by their cosines (Arrow, Ostapenko et al. 2024, compares with
the experts' own directions instead). Nothing here is in the paper.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.model import ComposedModel
from mixwright.composition.probe import encoder_of
from mixwright.data.batches import Batches
from mixwright.data.collate import Batch, inputs_of, padded_inputs
from mixwright.data.tasks import TextTask, read_task
from mixwright.errors import CatalogError
from mixwright.methods.tensorpoly.shots import tokenizer_of
from mixwright.methods.tensorpoly.task_rows import task_names, task_routers
from mixwright.ops.collapse import entropy
from mixwright.ops.mean_pool import mean_pool
from mixwright.routing import Condition

MEAN, SQUARE, COUNT = "task_features.mean", "task_features.square", "task_features.count"
"""What is remembered, with the composition: (tasks, width) means, (tasks,) mean squared lengths, (tasks,) texts."""
TEMPERATURE = 0.1
THRESHOLD = 0.5

Texts = Sequence[str] | str | Path | TextTask | Batches | Sequence[Batch]
Inputs = Mapping[str, Tensor] | Sequence[str]


@dataclass(frozen=True)
class Likeness:
    """Which tasks the rows of a batch resemble, and how sure that is; everything on the CPU.

    `similarity`: cosines with every task, NaN for one that is not remembered. `weights`: how much of each task's
    routing a row gets; what is missing to 1 is uniform. `confidence`: the best cosine over the one that texts of that
    task have on average, about 1 for a text of that task; rows under the threshold are not `trusted` and all uniform.
    `margin`: best cosine minus the next. `entropy`: of the softmax over log(remembered tasks), 1 for a guess.
    """

    tasks: tuple[str, ...]
    similarity: Float[Tensor, "batch tasks"]
    weights: Float[Tensor, "batch tasks"]
    confidence: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]
    trusted: Bool[Tensor, " batch"]

    @property
    def nearest(self) -> tuple[str, ...]:
        """The task that each row resembles most, trusted or not."""
        return tuple(self.tasks[int(task)] for task in self.similarity.nan_to_num(-2.0).argmax(-1))

    def __str__(self) -> str:
        lines = [
            f"{row}: {task} (confidence {float(sure):.2f}, margin {float(margin):.2f})" + ("" if kept else ", uniform")
            for row, (task, sure, margin, kept) in enumerate(
                zip(self.nearest, self.confidence, self.margin, self.trusted, strict=True)
            )
        ]
        return "\n".join(lines)


def remember(
    model: ComposedModel,
    task: str,
    texts: Texts,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    max_length: int = 512,
    limit: int | None = 256,
) -> int:
    """Remember what texts of `task` look like to the backbone, in place of what was known; returns how many.

    `texts`: texts, a file, folder or hub id, a TextTask (of rows with a prompt or a label the text alone is read), or
    Batches, whose inputs are read as they are. Saved with the composition. Raises ValueError for an unknown task.
    """
    names = task_names(model)
    if task not in names:
        raise ValueError(f"no task {task!r} in this model; it has {', '.join(names[:10]) or 'none'}.")
    total, squares, count = None, 0.0, 0
    for inputs in _inputs(model, texts, task, tokenizer, batch_size, max_length, limit):
        rows = features(model, inputs).double()
        total = rows.sum(0) if total is None else total + rows.sum(0)
        squares += float(rows.square().sum())
        count += len(rows)
    if total is None:
        raise ValueError(f"task {task!r}: no texts; give at least one.")
    place = names.index(task)
    for name, value in ((MEAN, total / count), (SQUARE, squares / count), (COUNT, float(count))):
        held = _grown(model.whole.get(name), len(names), () if name != MEAN else tuple(total.shape))
        held[place] = torch.as_tensor(value, dtype=torch.float32)
        model.whole[name] = held
    return count


@contextmanager
def with_similar(
    model: ComposedModel,
    inputs: Inputs,
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    temperature: float = TEMPERATURE,
    threshold: float = THRESHOLD,
) -> Generator[Likeness]:
    """Inside the block every pass is routed by what the rows of `inputs` resemble, one row each; yields the guess."""
    guess = likeness(
        model, inputs, tokenizer=tokenizer, max_length=max_length, temperature=temperature, threshold=threshold
    )
    device = next(model.backbone.parameters()).device
    with model.under(Condition(task_weights=guess.weights.to(device))):
        yield guess


def likeness(
    model: ComposedModel,
    inputs: Inputs,
    *,
    tokenizer: Any = None,
    max_length: int = 512,
    temperature: float = TEMPERATURE,
    threshold: float = THRESHOLD,
) -> Likeness:
    """softmax(cosine / temperature) over the tasks that are remembered, for rows that are trusted.

    Raises ValueError where fewer than two tasks are remembered, and for a kind whose tasks do not choose.
    """
    if not task_routers(model):
        raise ValueError("the tasks of this model do not choose (lora, tlora): there is no routing to resemble.")
    names = task_names(model)
    count = _grown(model.whole.get(COUNT), len(names), ())
    known = count.nonzero().squeeze(-1)
    if len(known) < 2:
        raise ValueError(
            f"{len(known)} of {len(names)} tasks are remembered, and resembling takes two or more; call "
            "model.remember(task, texts) for each task first."
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: expected a number over 0.")
    given = inputs if isinstance(inputs, Mapping) else _tokens(model, list(inputs), tokenizer, max_length)
    rows = features(model, given).cpu()
    similarity, usual = cosines(rows, model.whole[MEAN][known], model.whole[SQUARE][known])
    shares = torch.softmax(similarity / temperature, -1)
    (best, second), place = similarity.topk(2).values.unbind(-1), similarity.argmax(-1)
    confidence = best / usual[place].clamp_min(1e-6)
    trusted = confidence >= threshold
    return Likeness(
        tasks=names,
        similarity=_spread(similarity, known, len(names), torch.nan),
        weights=_spread(shares * trusted[:, None], known, len(names), 0.0),
        confidence=confidence,
        margin=best - second,
        entropy=entropy(shares) / log(shares.shape[-1]),
        trusted=trusted,
    )


def cosines(
    rows: Float[Tensor, "batch width"], means: Float[Tensor, "known width"], squares: Float[Tensor, " known"]
) -> tuple[Float[Tensor, "batch known"], Float[Tensor, " known"]]:
    """Cosines of centred rows and means, and about what each task's own texts have: |m - c| / sqrt(E |f - c|^2)."""
    centre = means.mean(0)
    moved, direct = rows - centre, means - centre
    lengths = torch.linalg.vector_norm(direct, dim=-1).clamp_min(1e-12)
    own = torch.linalg.vector_norm(moved, dim=-1, keepdim=True).clamp_min(1e-12)
    spread = (squares - 2 * means @ centre + centre @ centre).clamp_min(1e-24).sqrt()
    return moved @ (direct / lengths[:, None]).T / own, (lengths / spread).clamp_max(1.0)


def check_remembered(whole: Mapping[str, Tensor], tasks: int) -> None:
    """Raise CatalogError (TENSOR, SHAPE) for stored tensors that are not what `remember` leaves in a model."""
    names = (MEAN, SQUARE, COUNT)
    strange = sorted(set(whole) ^ set(names)) if whole else []
    if strange:
        raise CatalogError("TENSOR", "whole", f"{strange[0][:80]!r} is missing or belongs to no model routed by task.")
    shapes = {name: tuple(whole[name].shape) for name in names if whole}
    rows = {shape[0] for shape in shapes.values() if shape}
    if whole and (len(rows) != 1 or max(rows) > tasks or [len(shape) for shape in shapes.values()] != [2, 1, 1]):
        raise CatalogError("SHAPE", "whole", f"{shapes} are no features of {tasks} tasks, one row each.")


@torch.no_grad()
def features(model: ComposedModel, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
    """The bare backbone's last states, of its encoder where it has one, mean over real tokens; float32."""
    backbone = model.backbone
    body = encoder_of(backbone) or getattr(backbone, "base_model", backbone)
    device = next(backbone.parameters()).device
    ids = inputs["input_ids"].to(device)
    mask = inputs["attention_mask"].to(device) if "attention_mask" in inputs else torch.ones_like(ids)
    with eval_mode(backbone), model.disabled():
        states = cast(Any, body)(input_ids=ids, attention_mask=mask).last_hidden_state
    return mean_pool(states.float(), mask)


def _inputs(
    model: ComposedModel,
    texts: Texts,
    name: str,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    limit: int | None,
) -> Iterable[Mapping[str, Tensor]]:
    if isinstance(texts, Batches):
        return [texts.take(part).inputs for part in texts.in_order()]
    if not isinstance(texts, str | Path | TextTask) and texts and all(isinstance(item, Batch) for item in texts):
        return [batch.inputs for batch in cast(Sequence[Batch], texts)]
    if isinstance(texts, str | Path):
        texts = read_task(texts, limit=limit)
    found = [e.text for e in texts.examples] if isinstance(texts, TextTask) else list(cast(Sequence[str], texts))
    strange = next((text for text in found if not isinstance(text, str)), None)  # pyright: ignore  (a caller's)
    if strange is not None:
        raise ValueError(f"task {name!r}: a text is a {type(strange).__name__}; give texts, a file, or Batches.")
    found = found[:limit]
    parts = [found[start : start + batch_size] for start in range(0, len(found), batch_size)]
    return (_tokens(model, part, tokenizer, max_length) for part in parts)


def _tokens(model: ComposedModel, texts: Sequence[str], tokenizer: Any, max_length: int) -> dict[str, Tensor]:
    reader = tokenizer or tokenizer_of(model)
    return padded_inputs(reader, inputs_of(reader, texts, max_length))


def _grown(held: Tensor | None, tasks: int, shape: tuple[int, ...]) -> Tensor:
    """A row for every task, zero for those that are not remembered."""
    rows = torch.zeros(tasks, *shape)
    if held is not None:
        rows[: len(held)] = held
    return rows


def _spread(values: Tensor, known: Tensor, tasks: int, missing: float) -> Tensor:
    """Columns of the remembered tasks put where all tasks have one."""
    full = torch.full((len(values), tasks), missing, dtype=values.dtype)
    full[:, known] = values
    return full
