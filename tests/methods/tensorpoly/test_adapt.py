"""Adapting to a new task: what learns, what stays to the bit, what the folds choose, and that failure is undone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import Batches
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.tensorpoly.adapt import adapt
from mixwright.methods.tensorpoly.shots import deal
from mixwright.methods.tensorpoly.task_rows import append, mean_rows, task_routers

from . import teacher
from .teacher import HALVES, TWO

TOKENS = torch.arange(3, 9)[None]


def logits_of(model: Any, task: str) -> torch.Tensor:
    model.eval()
    with torch.no_grad(), model.with_task(task):
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("kind", ["poly", "mhr", "tensorpoly-1", "tensorpoly-2", "entangled"])
def test_router_alone_learns_held_out_rows_and_moves_nothing_else(kind: str) -> None:
    model = teacher.knowing(kind, **({"heads": 2} if kind == "mhr" else {}))
    held_out = teacher.shots(model, 64, like=HALVES, seed=5)
    append(model, "untaught", mean_rows(model))
    guess = teacher.loss(model, held_out, "untaught")
    before, answers = teacher.everything(model), {task: logits_of(model, task) for task in model.tasks}
    report = adapt(model, "new", teacher.shots(model, 16, like=HALVES), what="router", start="mean", steps=40)
    assert teacher.loss(model, held_out, "new") < 0.95 * guess
    assert all(torch.equal(logits_of(model, task), answers[task]) for task in answers)
    after = teacher.everything(model)
    routers = {name for name in before if name.endswith("router.logits")}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - routers)
    assert all(torch.equal(before[name], after[name][:-1]) for name in routers)
    assert model.tasks == (*teacher.TASKS, "untaught", "new")
    assert report.trained == sum(router.logits[0].numel() for router in task_routers(model))
    assert (report.what, report.start, report.source, report.candidates) == ("router", "mean", None, ())


@pytest.mark.parametrize("what", ["experts", "all"])
def test_experts_learn_held_out_rows_and_earlier_tasks_change_with_them(what: Any) -> None:
    model = teacher.knowing()
    held_out = teacher.shots(model, 64, like=HALVES, seed=5)
    guess = min(teacher.loss(model, held_out, task) for task in model.tasks)
    answers = logits_of(model, "zero")
    rows = [router.logits.detach().clone() for router in task_routers(model)]
    start: Any = "mean" if what == "all" else None
    few = teacher.shots(model, 16, like=HALVES)
    report = adapt(model, "new", few, what=what, start=start, steps=40, learning_rate=1e-2)
    assert teacher.loss(model, held_out, "new") < 0.9 * guess
    assert not torch.equal(logits_of(model, "zero"), answers)
    assert all(torch.equal(r.logits[:-1], row) for r, row in zip(task_routers(model), rows, strict=True))
    if what == "experts":
        assert report.start == "uniform" and all((r.logits[-1] == 0).all() for r in task_routers(model))


def test_folds_find_the_source_task_whose_routing_the_shots_have() -> None:
    model = teacher.knowing()
    few = teacher.shots(model, 12, like=TWO)
    report = adapt(model, "new", few, what="router", steps=12, folds=3)
    assert (report.start, report.source) == ("source", "two")
    by_start = {one.start: one for one in report.candidates}
    assert by_start["source"].mean < 0.8 * min(by_start["mean"].mean, by_start["fresh"].mean)
    assert all(len(one.losses) == 3 and one.spread > 0 for one in report.candidates)
    assert "the row of 'two'" in str(report) and "over 3 folds" in str(report)


def test_every_candidate_starts_from_the_same_weights_whatever_ran_before_it() -> None:
    few = teacher.shots(teacher.knowing(), 8, like=HALVES)
    alone = adapt(teacher.knowing(), "new", few, what="router", steps=4, folds=2)
    crowd = adapt(teacher.knowing(), "new", few, what="auto", steps=4, folds=2)
    losses = {str(one): one.losses for one in crowd.candidates}
    assert len(losses) == 7
    assert {str(one): one.losses for one in alone.candidates}.items() <= losses.items()


def test_the_same_seed_gives_the_same_model_and_the_choice_leaves_no_trace() -> None:
    few = teacher.shots(teacher.knowing(), 8, like=HALVES)
    chosen, direct = teacher.knowing(), teacher.knowing()
    report = adapt(chosen, "new", few, steps=4, folds=2)
    start: Any = None if report.start == "uniform" else report.start
    adapt(direct, "new", few, what=report.what, start=start, steps=4)
    one, other = teacher.everything(chosen), teacher.everything(direct)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("share", ["block", "model"])
def test_shared_routers_get_one_row_each(share: str) -> None:
    model = teacher.knowing("tensorpoly-1", share=share)
    few = teacher.shots(model, 8, like=HALVES)
    before = len(task_routers(model))
    report = adapt(model, "new", few, what="router", start="fresh", steps=3)
    assert len(task_routers(model)) == before == 1
    assert report.trained == 4 and task_routers(model)[0].logits.shape == (5, 4)
    assert model.routing_table().keys() == model.mixtures.keys()


@pytest.mark.parametrize("kind", ["lora", "tlora"])
def test_without_a_router_the_experts_are_all_there_is(kind: str) -> None:
    model = teacher.knowing(kind)
    few = teacher.shots(teacher.knowing(), 8, like=HALVES)
    guess = teacher.loss(model, few, "zero")
    report = adapt(model, "new", few, steps=30, learning_rate=3e-2)
    assert (report.what, report.start, report.candidates) == ("experts", "uniform", ())
    assert teacher.loss(model, few, "new") < 0.9 * guess
    with pytest.raises(ValueError, match=rf"{kind} has no router"):
        adapt(model, "other", few, what="router")


def test_noise_in_training_stays_out_of_uniform_routing() -> None:
    few = teacher.shots(teacher.knowing(), 8, like=HALVES)
    quiet, noisy = teacher.knowing(), teacher.knowing(noise=True)
    for model in (quiet, noisy):
        adapt(model, "new", few, what="experts", steps=3)
    one, other = teacher.everything(quiet), teacher.everything(noisy)
    assert all(torch.equal(one[name], other[name]) for name in one)


def failing_at(call: int, error: BaseException) -> Callable[[Any], Any]:
    """A collate that fails when it is called for the `call`-th time."""
    calls = iter(range(10_000))

    def collate(rows: Any) -> Any:
        if next(calls) == call:
            raise error
        return teacher.collate(rows)

    return collate


@pytest.mark.parametrize(
    ("call", "error"),
    [(0, RuntimeError("first")), (9, KeyboardInterrupt()), (40, MemoryError()), (70, KeyboardInterrupt())],
)
def test_a_failure_leaves_the_model_as_it_was(call: int, error: BaseException) -> None:
    model = teacher.knowing().train()
    few = teacher.shots(model, 8, like=HALVES)
    broken = Batches(few.examples, failing_at(call, error), batch_size=4, seed=0)
    routers = [mixture.router for mixture in model.train().mixtures.values()]
    before, asked = teacher.everything(model), [p.requires_grad for p in model.parameters()]
    parameters, answers = [id(p) for p in model.parameters()], logits_of(model, "two")
    model.train()
    with pytest.raises(type(error)):
        adapt(model, "new", broken, steps=3, folds=2)
    after = teacher.everything(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert [id(p) for p in model.parameters()] == parameters
    assert [p.requires_grad for p in model.parameters()] == asked and all(m.training for m in model.modules())
    assert [mixture.router for mixture in model.mixtures.values()] == routers
    assert model.tasks == teacher.TASKS and torch.equal(logits_of(model, "two"), answers)
    adapt(model, "new", few, what="router", start="mean", steps=2)


def test_divergence_is_undone_and_in_validation_it_only_loses() -> None:
    model = teacher.knowing()
    few, before = teacher.shots(model, 8, like=HALVES), teacher.everything(teacher.knowing())
    with pytest.raises(ValueError, match="not|nan|inf"):
        adapt(model, "new", few, what="experts", steps=20, learning_rate=1e30)
    after = teacher.everything(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and model.tasks == teacher.TASKS
    report = adapt(model, "new", few, start="mean", steps=20, learning_rate=1e30, folds=2)
    assert report.what == "router"
    assert {one.what: one.mean == float("inf") for one in report.candidates} == {
        "router": False,
        "experts": True,
        "all": True,
    }


def test_clear_errors() -> None:
    model = teacher.knowing()
    few = teacher.shots(model, 3, like=HALVES)
    with pytest.raises(ValueError, match=r"task 'two' is one of the model's already \(zero, one, two, three\)"):
        adapt(model, "two", few)
    with pytest.raises(ValueError, match=r"task ' ': expected a name"):
        adapt(model, " ", few)
    with pytest.raises(ValueError, match=r"task 7: expected a name"):
        adapt(model, 7, few)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps=0: expected 1 or more"):
        adapt(model, "new", few, steps=0)
    with pytest.raises(ValueError, match=r"task 'new': 3 shots; choosing by 4-fold validation needs .* fewer folds"):
        adapt(model, "new", few)
    with pytest.raises(ValueError, match=r"what='every'; expected one of router, experts, all, auto"):
        adapt(model, "new", few, what="every")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"trains under uniform routing; leave start out"):
        adapt(model, "new", few, what="experts", start="mean")
    with pytest.raises(ValueError, match=r"no tokenizer beside it; give tokenizer="):
        adapt(model, "new", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=r"examples are a int; expected a file, folder"):
        adapt(model, "new", 7, tokenizer=byte_tokenizer())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"new\[1\]: no 'completion'"):
        adapt(model, "new", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"new: no examples"):
        adapt(model, "new", [], tokenizer=byte_tokenizer())
    labelled = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"}]
    with pytest.raises(ValueError, match=r"3 shots, of label 1 only one; choosing by 2-fold"):
        adapt(model, "new", labelled, folds=2, tokenizer=byte_tokenizer())
    assert model.tasks == teacher.TASKS


SMALL: dict[str, Any] = {"rank": 2, "num_latent": 2}
ROWS = {
    "causal": [{"prompt": f"{c}:", "completion": c * 2} for c in "abcd"],
    "seq2seq": [{"prompt": f"{c}:", "completion": c * 2} for c in "abcd"],
    "encoder": [{"text": f"{c}{c}", "label": "vowel" if c in "aeio" else "consonant"} for c in "abeioudfg"],
}


@pytest.mark.parametrize(
    ("kind", "family", "site"), [("causal", "gpt2", "c_fc"), ("seq2seq", "t5", "wo"), ("encoder", "bert", "query")]
)
def test_what_users_have_on_every_kind_of_backbone(kind: Any, family: str, site: str, tmp_path: Path) -> None:
    rows = ROWS[kind]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    losses = []
    for examples in (rows, path, str(path)) if kind == "causal" else (rows, path):
        model = mw.compose(
            "tensorpoly", backbone=tiny_backbone(family), tasks=["one", "two"], target_modules=(site,), **SMALL
        )
        report = adapt(
            model, "new", examples, what="all", start="fresh", steps=8, tokenizer=byte_tokenizer(kind), max_length=16
        )
        losses.append(report.loss)
    before = adapt(model, "idle", rows, what="all", start="fresh", steps=1, tokenizer=byte_tokenizer(kind))
    assert losses[0] == losses[1] == losses[-1] and report.shots == len(rows)
    assert losses[0] < 2 * before.loss and model.tasks[-2:] == ("new", "idle")


def test_a_list_of_batches_will_do() -> None:
    model = teacher.knowing()
    data = teacher.shots(model, 12, like=TWO)
    batches = [data.take(slice(start, start + 3)) for start in range(0, 12, 3)]
    report = adapt(model, "new", batches, what="router", steps=4, folds=2)
    assert (report.shots, report.source) == (4, "two")


def test_labelled_text_tasks_are_dealt_by_label() -> None:
    labels = [0] * 7 + [1] * 5 + [2] * 4
    parts = deal(labels, 4, seed=3)
    assert sorted(number for part in parts for number in part) == list(range(16))
    for label in range(3):
        counts = [sum(labels[number] == label for number in part) for part in parts]
        assert max(counts) - min(counts) <= 1
    assert {len(part) for part in parts} == {4}
    assert deal(labels, 4, seed=3) == parts != deal(labels, 4, seed=4)


def test_no_shot_is_trained_on_in_the_fold_that_it_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.methods.tensorpoly import adapt as module

    model = teacher.knowing()
    few = teacher.shots(model, 8, like=HALVES)
    trained: list[set[int]] = []
    judged: list[set[int]] = []
    fit, own_loss = module.fit, module._loss

    def rows(batches: Batches) -> set[int]:
        return {next(i for i, e in enumerate(few.examples) if e[0] is row[0]) for row in batches.examples}

    def noting_fit(model: Any, stage: Any, data: Batches, **rest: Any) -> Any:
        trained.append(rows(data))
        return fit(model, stage, data, **rest)

    def noting_loss(model: Any, data: Batches, task: int = 0) -> float:
        judged.append(rows(data))
        return own_loss(model, data, task)

    monkeypatch.setattr(module, "fit", noting_fit)
    monkeypatch.setattr(module, "_loss", noting_loss)
    adapt(model, "new", few, what="router", start="auto", steps=1, folds=4)
    folds = trained[:-1]
    assert len(folds) == 12 and all(len(part) == 6 for part in folds) and trained[-1] == set(range(8))
    held_out = [part for part in judged[:-1] if len(part) == 2]
    assert [set(range(8)) - part for part in held_out] == folds


def test_text_tasks_come_as_they_are() -> None:
    model = mw.compose("tensorpoly", backbone=tiny_backbone("gpt2"), tasks=["one"], **SMALL)
    task = TextTask("t", "text", tuple(Example(text) for text in ("some words", "more words", "last words", "end")))
    report = adapt(model, "new", task, what="router", steps=2, folds=2, tokenizer=byte_tokenizer(), max_length=8)
    assert report.shots == 4 and len(report.candidates) == 3
