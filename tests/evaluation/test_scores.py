import math
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mixwright.data.collate import IGNORED, Batch
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.scores import (
    Choices,
    ChoiceTask,
    LabelTask,
    PooledTask,
    TokenTask,
    best_choice,
    length_normalised,
)
from mixwright.evaluation.systems import backbone
from mixwright.evaluation.table import Scores, Table

from .conftest import LANGUAGE, SUITE, batches


@dataclass
class Fixed:
    """Stands for a composed model: gives the logits it was made with."""

    logits: torch.Tensor

    def __call__(self, **inputs):
        return SimpleNamespace(logits=self.logits)


def nothing(batch):
    return None


def test_length_normalised_loss_by_hand_on_two_choices_with_end_token():
    # two choices of one question: tokens (5, END) and (END); END = 1 counts in both
    log = math.log
    probabilities = torch.full((2, 2, 6), 0.02)
    probabilities[0, 0, 5], probabilities[0, 1, 1] = 0.5, 0.25
    probabilities[1, 0, 1] = 0.3
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    targets = torch.tensor([[5, 1], [1, IGNORED]])
    batch = Batch("causal", {"input_ids": targets.clamp_min(0), "attention_mask": torch.ones(2, 2).long()}, targets, 3)
    p = probabilities
    by_hand = [-(log(p[0, 0, 5]) + log(p[0, 1, 1])) / (2 + 1e-6), -log(p[1, 0, 1]) / (1 + 1e-6)]
    from mixwright.evaluation.scores import token_losses

    losses, _ = token_losses(Fixed(p.log()), batch, None)
    scores = length_normalised(losses, targets != IGNORED)
    torch.testing.assert_close(scores, torch.tensor(by_hand))
    task = ChoiceTask("hand", [Choices(batch, torch.tensor([[True, True]]), torch.tensor([0]))])
    assert task.score(Fixed(p.log()), nothing)["accuracy"].tolist() == [float(by_hand[0] < by_hand[1])]


def test_padded_choices_never_win_and_the_first_of_equals_does():
    scores = torch.tensor([[0.7, 0.2, 0.0], [0.4, 0.4, 0.9]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert best_choice(scores, real).tolist() == [1, 0]
    assert best_choice(torch.tensor([[torch.inf, torch.inf]]), torch.tensor([[True, False]])).tolist() == [0]


def test_pooled_templates_are_the_mean_over_all_pairs():
    class Given(TokenTask):
        def score(self, model, conditions):
            return {"nats": torch.tensor(self.batches)}

    pooled = PooledTask("both", [Given("a", [1.0, 2.0, 3.0]), Given("b", [10.0])])
    values = pooled.score(None, nothing)["nats"]
    assert float(values.mean()) == pytest.approx((1 + 2 + 3 + 10) / 4)


def test_token_scores_match_a_loop_over_rows(model, kind):
    (batch,) = batches(kind, 0, 5)
    found = TokenTask("t", [batch]).score(model, nothing)
    for row in range(5):
        one = Batch(kind, {k: v[row : row + 1] for k, v in batch.inputs.items()}, batch.targets[row : row + 1], 1)
        inputs = dict(one.inputs)
        if kind == "seq2seq":
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=one.targets)
        log = model(**inputs, use_cache=False).logits[0].log_softmax(-1)
        kept = one.targets[0] != IGNORED
        losses = -log[kept].gather(-1, one.targets[0][kept, None])
        assert float(found["nats"][row]) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_exact_says_what_greedy_decoding_does(model, kind):
    from mixwright.evaluation.activations import greedy

    (batch,) = batches(kind, 1, 6)
    own = greedy(model, batch)
    found = TokenTask("own greedy output", [own]).score(model, nothing)
    assert found["exact"].tolist() == [1.0] * 6 and found["tokens"].tolist() == [1.0] * 6
    wrong = own.targets.clone()
    column = int((own.targets[2] != IGNORED).nonzero()[0])
    wrong[2, column] = (wrong[2, column] + 3) % LANGUAGE.vocab_size
    changed = TokenTask("one token changed", [Batch(kind, own.inputs, wrong, own.weight)]).score(model, nothing)
    assert changed["exact"].tolist()[2] == 0.0 and changed["exact"].tolist()[:2] == [1.0, 1.0]


def test_labels_go_to_the_nearest():
    class Encoder:
        def under(self, condition):
            return nullcontext()

        def __call__(self, **inputs):
            return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(inputs["input_ids"], 4).float())

    inputs = {"input_ids": torch.tensor([[0, 0], [1, 3]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    labels = {"input_ids": torch.tensor([[0], [1]]), "attention_mask": torch.ones(2, 1).long()}
    batch = Batch("encoder", inputs, torch.tensor([0, 0]), 2, labels)
    for anchors in (None, torch.eye(4)[:2]):
        found = LabelTask("t", [batch], anchors).score(Encoder(), nothing)
        assert found["accuracy"].tolist() == [1.0, 0.0]
        assert found["nats"][0] < found["nats"][1]


def test_means_over_tasks_are_unweighted_and_oracles_choose_per_task():
    table = Table()
    for system, first, second in (("a", [1.0, 1.0, 1.0, 1.0], [0.0]), ("b", [0.0, 0.0, 0.0, 0.5], [0.75])):
        table.add(Scores(system, "many", "accuracy", torch.tensor(first)))
        table.add(Scores(system, "one", "accuracy", torch.tensor(second)))
    assert table.means("accuracy") == {"a": 0.5, "b": pytest.approx(0.4375)}
    whole = table.with_best_experts(["a", "b"])
    means = whole.means("accuracy")
    assert means["best single expert"] == 0.5 and means["oracle (best expert per task)"] == pytest.approx(0.875)
    assert whole.differences("accuracy", "a")["a"].low == 0.0
    assert {"task", "metric", "value", "stderr", "n", "seed"} <= set(table.records()[0])
    columns, rows = whole.rows("accuracy", "a")
    assert len(columns) == len(rows[0]) and rows[0][0].startswith("oracle")


def test_evaluation_leaves_the_model_as_it_was(model, kind):
    tasks = [TokenTask(t.name, batches(kind, at, 4)) for at, t in enumerate(SUITE.tests)]
    model.backbone.train()
    modes = [module.training for module in model.modules()]
    before = {site: (m.router, m.experts) for site, m in model.mixtures.items()}
    table = evaluate(model, tasks, [backbone()])
    assert modes == [module.training for module in model.modules()]
    assert before == {site: (m.router, m.experts) for site, m in model.mixtures.items()}
    model.eval()
    assert table.systems == ["backbone"] and len(table.tasks) == 3
