"""The comparison on MAD measures what it says: branches are runs, paths run their own layers, caches are continued."""

import importlib
import json

import pytest
import torch

from mixwright.data.mad_tasks import SelectiveCopy

pytestmark = pytest.mark.usefixtures("benchmarks_importable")
TASK = SelectiveCopy(8, 12, 3)


@pytest.fixture
def models():
    return importlib.import_module("benchmarks.hybrid_mad_models")


def small(models, **settings):
    return models.Size(
        **{"width": 16, "heads": 2, "chunk": 4, "batch": 4, "steps": 8, "validation": 8, "test": 8, **settings}
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_branch_is_the_run_of_its_own_length(models):
    size, examples = small(models), TASK.sample(40, 0)
    together = models.make("hybrid K=1", size, TASK, 0)
    at = {n: weights(together) for n in models.trained(together, examples, size, 5e-3, [6, 10])}
    for steps in (6, 10):
        alone = models.make("hybrid K=1", size, TASK, 0)
        list(models.trained(alone, examples, size, 5e-3, [steps]))
        assert torch.equal(at[steps], weights(alone))
    assert not torch.equal(at[6], at[10])


def test_mixture_weights_learn_where_they_are_searched_and_nowhere_else(models):
    size, examples = small(models), TASK.sample(24, 0)
    for arm, moves in (("hybrid K=2", True), ("hybrid K=2, uniform", False), ("SSM then attention", False)):
        model = models.make(arm, size, TASK, 0)
        before, others = model.mixture_weights, weights(model)
        list(models.trained(model, examples, size, 5e-3, [6]))
        assert torch.equal(before, model.mixture_weights) != moves
        assert not torch.equal(others, weights(model))


def test_the_hand_made_path_has_the_first_layers_of_one_and_the_last_of_the_other(models):
    model = models.make("SSM then attention", small(models), TASK, 0)
    assert model.mixture_weights.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    examples = TASK.sample(4, 0)
    models.loss_of(model, examples.tokens, examples.targets).backward()
    read = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {int(n.split("layers.")[1][0]) for n in read if "components.1.backbone.layers" in n} == {0, 1}
    assert {int(n.split("layers.")[1][0]) for n in read if "components.0.gpt_neox.layers" in n} == {1}
    assert models.parameters(model) == sum(p.numel() for n, p in model.named_parameters() if n in read)
    assert not any("projector" in n or ".enter." in n or ".leave." in n for n in read)


def test_equal_flops_are_those_of_the_searched_hybrid(models):
    mad, size = importlib.import_module("benchmarks.hybrid_mad"), small(models)
    tokens, targets = TASK.sample(4, 0).tokens, TASK.sample(4, 0).targets
    steps = {arm: mad.horizons(arm, size, TASK) for arm in models.ARMS}
    cost = {arm: models.operations(models.make(arm, size, TASK, 0), tokens, targets) for arm in models.ARMS}
    assert all(s["steps"] == 8 for s in steps.values()) and steps[models.REFERENCE]["flops"] == 8
    for arm in models.ARMS:
        off = abs(steps[arm]["flops"] * cost[arm] / (8 * cost[models.REFERENCE]) - 1)
        assert off <= (0.12 if steps[arm]["flops"] == 8 else 0.5 / steps[arm]["flops"])
    assert cost["NeoX, twice as deep"] > 1.5 * cost["NeoX"] and steps["SSM then attention"]["flops"] > 12


def test_an_ensemble_of_all_weight_on_one_member_is_that_member(models):
    size, tokens = small(models), TASK.sample(4, 0).tokens
    both = models.make("logit ensemble", size, TASK, 0).eval()
    with torch.no_grad():
        both.logits.copy_(torch.tensor([0.0, -1e4]))
        assert torch.equal(both(input_ids=tokens).logits, models.make("NeoX", size, TASK, 0)(input_ids=tokens).logits)


def test_a_cut_run_goes_on_and_seeds_after_the_first_have_its_rate(models, tmp_path, monkeypatch):
    mad = importlib.import_module("benchmarks.hybrid_mad")
    monkeypatch.setattr(mad, "ARMS", ("NeoX", "SSM then attention", "hybrid K=2"))
    monkeypatch.setattr(mad, "TASKS", {TASK.name: TASK})
    cache, size = tmp_path / "cells.jsonl", small(models)

    def lines():
        return [json.loads(line) for line in cache.read_text().splitlines()]

    mad.run(mad.Cells(cache, "s"), size, [TASK.name], [1], "cpu", arms=mad.ARMS)
    whole = lines()
    assert all(
        {c["steps"] for c in whole if c["arm"] == arm} == set(mad.horizons(arm, size, TASK).values())
        for arm in mad.ARMS
    )
    for column in ("steps", "flops"):
        tuned = [c for c in whole if c["seed"] == 0 and c["arm"] == "NeoX" and column in c["columns"]]
        best = max(tuned, key=lambda c: (c["validation"]["accuracy"], -c["validation"]["loss"]))
        later = [c for c in whole if c["seed"] == 1 and c["arm"] == "NeoX" and column in c["columns"]]
        assert {2e-3, 5e-3} <= {c["rate"] for c in tuned} and [c["rate"] for c in later] == [best["rate"]]
    mad.run(mad.Cells(cache, "s"), size, [TASK.name], [1], "cpu", arms=mad.ARMS)
    assert lines() == whole  # nothing is measured twice
    cache.write_text("".join(json.dumps(cell) + "\n" for cell in whole[:-2]))
    mad.run(mad.Cells(cache, "s"), size, [TASK.name], [1], "cpu", arms=mad.ARMS)
    again = lines()
    assert [{**c, "cpu_seconds": 0} for c in again] == [{**c, "cpu_seconds": 0} for c in whole]
    assert mad.Cells(cache, "other settings").known == []


def cell(task, arm, seed, accuracy, rate=2e-3, validation=None):
    scored = {"accuracy": accuracy, "loss": 1.0}
    return {
        "task": task, "arm": arm, "seed": seed, "rate": rate, "steps": 8, "columns": ["steps"], "parameters": 1,
        "validation": {"accuracy": accuracy if validation is None else validation, "loss": 1.0}, "test": scored,
        "cpu_seconds": 1.0, "mixture_weights": [[0.25, 0.75], [0.5, 0.5]] if "hybrid" in arm else None,
    }  # fmt: skip


def test_the_answers_count_losses_as_well_as_wins_and_leave_the_tuning_seed_out(models):
    tables = importlib.import_module("benchmarks.hybrid_mad_tables")
    accuracy = {"won": (0.5, 0.4, 0.6, 0.7), "lost": (0.5, 0.9, 0.4, 0.8)}  # NeoX, Mamba-2, the deep ones, the hybrid
    cells = []
    for task, (attention, state, deep, hybrid) in accuracy.items():
        for seed in (9, 0, 1):
            for arm in models.ARMS:
                value = {"NeoX": attention, "Mamba-2": state, "hybrid K=2": hybrid}.get(arm, deep)
                value = 0.99 if seed == 9 else value + 0.01 * seed * (arm == "hybrid K=2")
                cells.append(cell(task, arm, seed, value))
    cells.append(cell("won", "NeoX", 0, 0.99, rate=5e-3))  # a rate that the tuning seed did not choose
    found = tables.summary(cells, [0, 1], 9)
    assert found["steps"]["won"]["NeoX"]["accuracy"] == [0.5, 0.5] and found["steps"]["won"]["NeoX"]["rate"] == 2e-3
    text = tables.report({"steps": found["steps"]})
    assert "at or above the better component on 1 of 2 tasks" in text
    assert "won, NeoX: +0.205 (95 % +0.141 .. +0.269), better (+0.200, +0.210)" in text
    assert "lost, Mamba-2: -0.095 (95 % -0.159 .. -0.031), worse (-0.100, -0.090)" in text
    assert "at or above the better twice-as-deep model on 2 of 2 tasks" in text
    assert (
        "| NeoX (8) | 0.500 (0.500 .. 0.500) | 0.500 (0.500 .. 0.500) |" in text and "0.75 / 0.50, 0.75 / 0.50" in text
    )
    assert "| NeoX | 0.002 | 0.002 |" in text


def test_what_seeds_do_not_tell_apart_is_no_difference(models):
    tables = importlib.import_module("benchmarks.hybrid_mad_tables")
    assert tables.verdict([0.1]) == tables.verdict([0.1, 0.3, -0.1]) == "no significant difference"
    assert tables.verdict([0.0, 0.0, 0.0]) == "no significant difference"
    assert tables.verdict([0.1, 0.11, 0.12]) == "better" and tables.verdict([-0.1, -0.11, -0.12]) == "worse"
