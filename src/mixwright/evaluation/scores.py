"""Scores of a model, example by example, so that two systems can be compared on the same ones.

Token loss is that of the released PHATGOOSE code: a choice's score is the sum of its token losses, the end token
included, over (number of tokens + 1e-6); a padded choice never wins, and the first of equals does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixwright.composition.model import ComposedModel
from mixwright.data.collate import IGNORED, Batch
from mixwright.evaluation.embedding import embed
from mixwright.routing import Condition

Conditions = Callable[[Batch], Condition | None]
"""What a system knows about a batch: retrieval's choice for each row, or nothing."""

LOWER_IS_BETTER = frozenset({"nats"})
TEMPERATURE = 0.05


class AbstractTask(ABC):
    """Examples, and what is measured on them."""

    name: str

    @abstractmethod
    def score(self, model: ComposedModel, conditions: Conditions) -> dict[str, Float[Tensor, " examples"]]:
        """Metric -> one value for each example."""


def token_losses(
    model: ComposedModel, batch: Batch, condition: Condition | None
) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """The loss at every target, 0 where none counts, and whether the model's first choice there is wrong."""
    logits = _logits(model, batch, condition).float()
    losses = cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
    return losses, (logits.argmax(-1) != batch.targets) & (batch.targets != IGNORED)


def _logits(model: ComposedModel, batch: Batch, condition: Condition | None) -> Float[Tensor, "batch seq vocab"]:
    inputs: dict[str, Any] = {**batch.inputs, "use_cache": False}
    if batch.kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
        inputs["decoder_attention_mask"] = (batch.targets != IGNORED).long()
    return model(**inputs, condition=condition).logits


@dataclass(frozen=True)
class TokenTask(AbstractTask):
    """Texts to be continued. `nats`: mean loss of an example's tokens; `tokens`: share of them predicted first;
    `exact`: 1 where all are, the end token included, which is the case just where greedy decoding gives the target."""

    name: str
    batches: Sequence[Batch]

    def score(self, model: ComposedModel, conditions: Conditions) -> dict[str, Float[Tensor, " examples"]]:
        """`nats`, `tokens` and `exact`."""
        found: dict[str, list[Tensor]] = {"nats": [], "tokens": [], "exact": []}
        for batch in self.batches:
            losses, wrong = token_losses(model, batch, conditions(batch))
            count = (batch.targets != IGNORED).sum(-1).clamp_min(1)
            found["nats"].append(losses.sum(-1) / count)
            found["tokens"].append(1.0 - wrong.sum(-1) / count)
            found["exact"].append((~wrong.any(-1)).float())
        return _joined(found)


@dataclass(frozen=True)
class Choices:
    """Questions whose answers are ranked: `batch` has a row for each (question, choice), questions outermost.

    `real` (questions, choices) is false for padding; `gold` (questions,) is the right choice.
    """

    batch: Batch
    real: Bool[Tensor, "questions choices"]
    gold: Int[Tensor, " questions"]


@dataclass(frozen=True)
class ChoiceTask(AbstractTask):
    """Rank classification: the choice with the smallest length-normalised loss is the answer; `accuracy`."""

    name: str
    questions: Sequence[Choices]

    def score(self, model: ComposedModel, conditions: Conditions) -> dict[str, Float[Tensor, " examples"]]:
        """`accuracy`."""
        found: list[Tensor] = []
        for choices in self.questions:
            losses, _ = token_losses(model, choices.batch, conditions(choices.batch))
            scores = length_normalised(losses, choices.batch.targets != IGNORED).reshape(choices.real.shape)
            found.append((best_choice(scores, choices.real) == choices.gold).float())
        return {"accuracy": torch.cat(found).cpu()}


def length_normalised(losses: Float[Tensor, "rows seq"], counted: Bool[Tensor, "rows seq"]) -> Float[Tensor, " rows"]:
    """sum of token losses / (number of tokens + 1e-6)."""
    return (losses * counted).sum(-1) / (counted.sum(-1) + 1e-6)


def best_choice(
    scores: Float[Tensor, "questions choices"], real: Bool[Tensor, "questions choices"]
) -> Int[Tensor, " questions"]:
    """The real choice with the smallest score; the first of equals."""
    return scores.masked_fill(~real, torch.inf).argmin(-1)


@dataclass(frozen=True)
class LabelTask(AbstractTask):
    """Texts to be matched with the nearest label text, for sentence encoders.

    `anchors` (classes, width) are embedded labels, the same for every system; without them each system embeds
    `batch.label_inputs` itself. `accuracy`, and `nats`: the loss of the right label at temperature 0.05.
    """

    name: str
    batches: Sequence[Batch]
    anchors: Float[Tensor, "classes width"] | None = None

    def score(self, model: ComposedModel, conditions: Conditions) -> dict[str, Float[Tensor, " examples"]]:
        """`accuracy` and `nats`."""
        found: dict[str, list[Tensor]] = {"accuracy": [], "nats": []}
        labels = self.anchors
        for batch in self.batches:
            if labels is None:
                labels = self._labels(model, batch, conditions)
            texts = _embedded(model, batch.inputs, conditions(batch))
            cosines = torch.einsum("bw,cw->bc", texts, labels)
            found["accuracy"].append((cosines.argmax(-1) == batch.targets).float())
            found["nats"].append(cross_entropy(cosines / TEMPERATURE, batch.targets, reduction="none"))
        return _joined(found)

    def _labels(self, model: ComposedModel, batch: Batch, conditions: Conditions) -> Tensor:
        if batch.label_inputs is None:
            raise ValueError(f"task {self.name}: give anchors, or batches with label_inputs, the texts of the labels.")
        count = len(batch.label_inputs["input_ids"])
        as_batch = Batch("encoder", batch.label_inputs, torch.arange(count), count, task_ids=batch.label_task_ids)
        return _embedded(model, batch.label_inputs, conditions(as_batch))


def _embedded(model: ComposedModel, inputs: Mapping[str, Tensor], condition: Condition | None) -> Tensor:
    with model.under(condition):
        return embed(model, inputs)


@dataclass(frozen=True)
class PooledTask(AbstractTask):
    """One task under several templates: the plain mean over all (example, template) pairs."""

    name: str
    templates: Sequence[AbstractTask]

    def score(self, model: ComposedModel, conditions: Conditions) -> dict[str, Float[Tensor, " examples"]]:
        """The metrics of the templates, one after another."""
        each = [template.score(model, conditions) for template in self.templates]
        return {metric: torch.cat([scores[metric] for scores in each]) for metric in each[0]}


def _joined(found: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {metric: torch.cat(list(values)).float().cpu() for metric, values in found.items()}
