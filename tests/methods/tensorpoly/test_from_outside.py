"""What others do with a model that is routed by task: transformers' Trainer and pipeline, and masks of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone

TASKS = ("rte", "copa", "unseen")


def composed(family: str = "llama", **config: Any) -> Any:
    settings = {"tasks": TASKS, "experts": "entangled", "rank": 2, **config}
    return mw.compose("tensorpoly", backbone=tiny_backbone(family), **settings)


def shaken(model: Any) -> Any:
    """As after training: every tensor of the experts and routers is random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4 if ".experts." in name else 2.0)
    return model


def logits_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".router." in name}


def test_transformers_trainer_trains_a_mixture_of_tasks(tmp_path: Path) -> None:
    """`task_ids` is a column like any other: it survives remove_unused_columns, and rows train their own task's row."""
    from transformers import Trainer, TrainingArguments

    model = composed().train()
    before, frozen = logits_of(model), {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    draw = torch.Generator().manual_seed(0)
    starts = torch.randint(4, 260, (8,), generator=draw).tolist()
    rows = [
        {"input_ids": ids, "labels": ids, "task_ids": i % 2, "unused": "x"}
        for i, ids in enumerate([start + (k * (1 + i % 2)) % 5 for k in range(6)] for i, start in enumerate(starts))
    ]
    settings = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=5e-2, disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    after = logits_of(model)
    for name, old in before.items():
        assert not torch.equal(after[name][:2], old[:2]) and torch.equal(after[name][2], old[2])
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "labels", "task_ids"}


def test_a_pipeline_writes_under_a_task() -> None:
    from transformers import pipeline

    model = shaken(composed("gpt2"))
    write = pipeline("text-generation", model=model, tokenizer=byte_tokenizer())
    answers: dict[str, str] = {}
    for task in TASKS:
        with model.with_task(task):
            (found,) = write("ab", max_new_tokens=6, do_sample=False)
        answers[task] = found["generated_text"]
        ids = byte_tokenizer()("ab", return_tensors="pt")
        alone = model.generate(
            **ids, task_ids=torch.tensor([TASKS.index(task)]), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert byte_tokenizer().decode(alone[0], skip_special_tokens=True) == answers[task]
    assert len(set(answers.values())) > 1
    with pytest.raises(ValueError, match=r"needs condition\.task_ids.*with model\.with_task\(name\)"):
        write("ab", max_new_tokens=2)


def test_latent_experts_can_not_be_masked() -> None:
    model = composed()
    with pytest.raises(ValueError, match="weighs every expert and can't leave one out"):
        model.set_active(["latent-0"])
    assert model.active == model.experts == ("latent-0", "latent-1")


@pytest.mark.parametrize("experts", ["poly", "mhr", "tensorpoly-1", "tensorpoly-2", "entangled"])
def test_rows_of_weights(experts: str) -> None:
    """Sheet, property 18, at every layer: weights are no less than zero and sum to one; evaluation draws nothing."""
    model = shaken(composed(experts=experts, num_latent=3, heads=4 if experts == "mhr" else None, noise=True))
    ids = torch.randint(4, 260, (2, 5))
    with torch.no_grad():
        for task in TASKS:
            with model.trace() as trace, model.with_task(task):
                first, second = (model(input_ids=ids).logits for _ in range(2))
            assert torch.equal(first, second)
            for site, routings in trace.items():
                weights, row = routings[0].weights, model.routing_table()[site][TASKS.index(task)]
                assert (weights >= 0).all() and torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
                assert torch.equal(weights.reshape(row.shape), row)


def test_the_mean_of_noisy_weights_is_that_of_relaxed_bernoulli_samples() -> None:
    """Sheet, a.2 and property 18: the mean of samples is not sigmoid(z): 0.661 at z = 1, 0.886 at z = 3."""
    from mixwright.routers.task import TaskLogits
    from mixwright.routing import Condition

    z = torch.tensor([[1.0, 3.0]])
    router = TaskLogits(z, noise=True).train()
    torch.manual_seed(0)
    many = torch.zeros(40_000, dtype=torch.long)
    weights = router(torch.zeros(len(many), 1, 2), Condition(task_ids=many)).weights.squeeze(1)
    draw = torch.rand(40_000, 2)
    samples = torch.sigmoid(z + torch.log(draw) - torch.log1p(-draw))
    assert samples.mean(0).tolist() == pytest.approx([0.661, 0.886], abs=6e-3)
    wanted = (samples / samples.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(weights.mean(0), wanted, rtol=0, atol=6e-3)
    assert (weights.mean(0) - torch.sigmoid(z)[0] / torch.sigmoid(z).sum()).abs().max() > 2e-2
