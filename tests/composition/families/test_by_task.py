"""Rows of several tasks in one batch, over families and kinds of experts: forward, generate, training, and caches.

The law throughout: row i of a mixed batch is what a pass of that row alone gives under its task.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.model import ComposedModel
from mixwright.routing import Condition

KINDS = ("poly", "mhr", "tensorpoly-1", "tensorpoly-2", "entangled")
FAMILIES = ("llama", "gpt_neox", "t5", "bert", "mamba2")
PAIRS = [("llama", kind) for kind in KINDS] + list(itertools.product(FAMILIES[1:], ("mhr", "tensorpoly-1")))
IDS = torch.tensor([2, 0, 2, 1])


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, str], ComposedModel]:
    """Models of this module, by family and kind; tests leave them as they found them."""
    return {}


@pytest.fixture
def model(request: pytest.FixtureRequest, built: dict[tuple[str, str], ComposedModel], by_task: Any) -> ComposedModel:
    family, kind = request.param
    if request.param not in built:
        lively = {"initializer_factor": 5.0} if family == "t5" else {"initializer_range": 0.2}
        built[request.param] = by_task(tiny_backbone(family, **lively), kind)
    return built[request.param]


def pairs(found: list[tuple[str, str]]) -> Any:
    return pytest.mark.parametrize("model", found, indirect=True, ids="-".join)


def inputs_of(model: ComposedModel, rows: int = 4, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(4, 260, (rows, length), generator=draw)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(4, 260, (rows, 5), generator=draw)
    return inputs


def output(model: Any, inputs: dict[str, Tensor], task_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, task_ids=task_ids)[0]


def row(inputs: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    return {name: tensor[place : place + 1] for name, tensor in inputs.items()}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pairs(PAIRS)
def test_a_mixed_batch_is_its_rows_alone(model: ComposedModel) -> None:
    inputs = inputs_of(model)
    mixed = output(model, inputs, IDS)
    for place, task in enumerate(IDS.tolist()):
        close(mixed[place : place + 1], output(model, row(inputs, place), torch.tensor([task])))
    order = torch.tensor([3, 1, 0, 2])
    close(output(model, {name: t[order] for name, t in inputs.items()}, IDS[order]), mixed[order])
    other = output(model, inputs, (IDS + 1) % 3)
    assert (other - mixed).abs().amax((1, 2)).min() > 1e-2  # every row hears of its own task


@pairs(PAIRS)
def test_one_id_is_for_the_whole_batch(model: ComposedModel) -> None:
    inputs = inputs_of(model)
    close(output(model, inputs, torch.tensor([1])), output(model, inputs, torch.tensor([1, 1, 1, 1])))


@pairs([("llama", "entangled"), ("t5", "mhr"), ("bert", "tensorpoly-1")])
def test_choices_repeat_the_rows_of_a_batch(model: ComposedModel) -> None:
    """Sheet, d.10: three choices for each question, one task id for each question."""
    inputs = {name: tensor.repeat_interleave(3, 0) for name, tensor in inputs_of(model, 2).items()}
    ids = torch.tensor([2, 0])
    close(output(model, inputs, ids), output(model, inputs, ids.repeat_interleave(3)))
    with pytest.raises(ValueError, match=r"condition\.task_ids has 4 rows but the pass has 6"):
        output(model, inputs, IDS)
    with pytest.raises(ValueError, match=r"condition\.task_ids has 2 rows but the pass has 1"):
        output(model, row(inputs, 0), ids)


@pairs([("t5", "mhr"), ("t5", "tensorpoly-1")])
def test_choices_share_one_encoding(model: ComposedModel) -> None:
    """The encoder reads two questions, the decoder scores three choices of each, under two task ids throughout."""
    questions, choices = inputs_of(model, 2)["input_ids"], inputs_of(model, 6, seed=1)["decoder_input_ids"]
    ids = torch.tensor([2, 0])
    with model.under(Condition(task_ids=ids)), torch.no_grad():
        states = model.get_encoder()(input_ids=questions).last_hidden_state
        found = model(encoder_outputs=(states.repeat_interleave(3, 0),), decoder_input_ids=choices).logits
    whole = {"input_ids": questions.repeat_interleave(3, 0), "decoder_input_ids": choices}
    close(found, output(model, whole, ids.repeat_interleave(3)))


@pairs([("llama", "tensorpoly-2"), ("t5", "mhr"), ("bert", "poly")])
@pytest.mark.parametrize("strange", [3, -1])
def test_an_id_that_is_no_task_is_refused(model: ComposedModel, strange: int) -> None:
    with pytest.raises(ValueError, match=rf"task_ids holds {strange}, but this router knows 3 tasks, 0 to 2"):
        output(model, inputs_of(model), torch.tensor([0, strange, 1, 1]))
    with pytest.raises(ValueError, match=r"a task router needs condition\.task_ids"):
        model(**inputs_of(model))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "several answers": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
}


@pairs([("llama", "tensorpoly-1"), ("gpt_neox", "entangled"), ("t5", "mhr")])
@pytest.mark.parametrize("way", WAYS)
def test_generate(model: ComposedModel, way: str) -> None:
    ids = inputs_of(model)["input_ids"]
    settings = {**WAYS[way], "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    answers: list[Tensor] = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=IDS, use_cache=use_cache, **settings)
        answers.append(found)
    assert torch.equal(*answers)
    if way == "sampled":
        return
    count = settings.get("num_return_sequences", 1)
    for place, task in enumerate(IDS.tolist()):
        alone = model.generate(
            ids[place : place + 1], attention_mask=torch.ones_like(ids[:1]), task_ids=torch.tensor([task]), **settings
        )
        assert torch.equal(answers[0][place * count : (place + 1) * count], alone)
    others = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=(IDS + 1) % 3, **settings)
    assert not torch.equal(others, answers[0])


@pairs([("mamba2", "tensorpoly-1")])
def test_a_state_space_model_generates(model: ComposedModel) -> None:
    ids = inputs_of(model)["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(ids, task_ids=IDS, **settings)
    alone = [model.generate(ids[i : i + 1], task_ids=IDS[i : i + 1], **settings) for i in range(4)]
    assert torch.equal(mixed, torch.cat(alone))


@pairs([("llama", "entangled"), ("gpt_neox", "mhr"), ("t5", "tensorpoly-1")])
def test_padded_rows_generate_the_same(model: ComposedModel) -> None:
    ids = inputs_of(model, 2)["input_ids"]
    tasks = torch.tensor([1, 2])
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), task_ids=tasks, **settings)[:, -4:]
    pad = (0, 3) if model.config.is_encoder_decoder else (3, 0)
    wide, mask = (torch.nn.functional.pad(tensor, pad) for tensor in (ids, torch.ones_like(ids)))
    assert torch.equal(model.generate(wide, attention_mask=mask, task_ids=tasks, **settings)[:, -4:], plain)


def gradients(model: ComposedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, task_ids=IDS)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "kind"), [("llama", "tensorpoly-2"), ("t5", "mhr"), ("bert", "tensorpoly-1")])
def test_a_mixed_batch_trains_as_its_rows_and_with_checkpoints(family: str, kind: str, by_task: Any) -> None:
    rates = {"t5": ("dropout_rate",), "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    backbone = tiny_backbone(family, **dict.fromkeys(rates.get(family, ()), 0.0))
    model: ComposedModel = by_task(backbone, kind).train()
    inputs = inputs_of(model)
    mixed = gradients(model, inputs)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(mixed) == trained and all(".router." in name or ".experts." in name for name in trained)
    model.zero_grad()
    for place in range(len(IDS)):
        loss = model(**row(inputs, place), task_ids=IDS[place : place + 1])[0].square().mean()
        (loss / len(IDS)).backward()
    for name, parameter in model.named_parameters():
        if name in mixed:
            torch.testing.assert_close(parameter.grad, mixed[name], rtol=1e-3, atol=1e-6)
    model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, {**inputs, "use_cache": False} if family != "bert" else inputs)
    assert again.keys() == mixed.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, mixed[name], rtol=1e-4, atol=1e-7)


def test_layers_that_run_again_do_so_under_the_tasks_of_their_own_pass(by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), "tensorpoly-1").train()
    inputs = {**inputs_of(model), "use_cache": False}
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        losses = [model(**inputs, task_ids=ids)[0].square().mean() for ids in (IDS, IDS.flip(0))]
        with model.trace() as trace:
            (losses[0] - 3 * losses[1]).backward()
        assert not trace
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("noise", [False, True])
def test_noise_only_in_training_and_only_when_asked(noise: bool, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), "tensorpoly-2", noise=noise)
    inputs = inputs_of(model)
    assert torch.equal(output(model, inputs, IDS), output(model, inputs, IDS))
    model.train()
    torch.manual_seed(0)
    first = output(model, inputs, IDS)
    assert torch.equal(first, output(model, inputs, IDS)) != noise
    torch.manual_seed(0)
    assert torch.equal(first, output(model, inputs, IDS))
    model.eval()
    assert torch.equal(output(model, inputs, IDS), output(model, inputs, IDS))


def step(model: ComposedModel, part: str) -> None:
    """One step of an optimiser on the experts or the routers alone."""
    chosen = [p for name, p in model.named_parameters() if f".{part}." in name]
    optimizer = torch.optim.SGD(chosen, lr=50.0)
    model(**inputs_of(model), task_ids=IDS)[0].square().mean().backward()
    optimizer.step()


def reload(model: ComposedModel, part: str) -> None:
    state = {name: t * 0.5 if f".{part}." in name else t for name, t in model.state_dict().items()}
    model.load_state_dict(state)


@torch.no_grad()
def write_in_place(model: ComposedModel, part: str) -> None:
    for name, parameter in model.named_parameters():
        if f".{part}." in name:
            parameter.mul_(0.5)


def assign(model: ComposedModel, part: str) -> None:
    state = {name: t * 0.5 if f".{part}." in name else t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


CHANGES: dict[str, Callable[[ComposedModel, str], None]] = {
    "an optimiser's step": step,
    "load_state_dict": reload,
    "load_state_dict by assignment": assign,
    "a write in place": write_in_place,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["experts", "router"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_is_built_anew_after(change: str, part: str, kind: str, by_task: Any) -> None:
    """Sheet, property 23, seen from outside: without any call of train() or eval() in between."""
    model: ComposedModel = by_task(tiny_backbone("llama"), kind)
    inputs = inputs_of(model)
    before = [output(model, inputs, IDS) for _ in range(2)][1]  # the second pass reads what the first one kept
    CHANGES[change](model, part)
    after = output(model, inputs, IDS)
    assert (after - before).abs().max() > 1e-5
    assert torch.equal(after, output(copy.deepcopy(model), inputs, IDS))  # a copy keeps nothing


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_follows_dtype_task_and_disabling(kind: str, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), kind)
    inputs = inputs_of(model)
    kept = output(model, inputs, IDS)
    model.double()
    wide = output(model, inputs, IDS)
    assert wide.dtype == torch.float64 and 0 < (wide - kept.double()).abs().max() < 1e-4
    model.float()
    assert torch.equal(output(model, inputs, IDS), kept)
    model.bfloat16()
    assert {p.dtype for name, p in model.named_parameters() if ".experts." in name} == {torch.float32}
    assert output(model, inputs, IDS).dtype == torch.bfloat16
    model.float()  # the backbone has lost digits for good, the experts none
    with model.disabled():
        bare = output(model, inputs, IDS)
    assert (bare - output(model, inputs, IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_inference_mode(kind: str, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), kind)
    inputs = inputs_of(model)
    with torch.inference_mode():
        kept = model(**inputs, task_ids=IDS)[0].clone()
    assert torch.equal(output(model, inputs, IDS), kept)
    found = gradients(model, inputs)  # in eval mode too
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


@pytest.mark.parametrize("kind", ["mhr", "entangled"])
def test_what_is_kept_is_in_no_file(kind: str, by_task: Any) -> None:
    model: ComposedModel = by_task(tiny_backbone("llama"), kind)
    names = set(model.state_dict())
    output(model, inputs_of(model), IDS)
    assert set(model.state_dict()) == names


def alternating(model: ComposedModel) -> Iterator[Tensor]:
    inputs = inputs_of(model)
    for ids in (IDS, torch.tensor([1]), IDS.flip(0), IDS):
        yield output(model, inputs, ids)


def test_tasks_take_turns(by_task: Any) -> None:
    """One task's factors are never another's, whatever was asked before."""
    model: ComposedModel = by_task(tiny_backbone("llama"), "entangled")
    fresh = [output(copy.deepcopy(model), inputs_of(model), ids) for ids in (IDS, torch.tensor([1]), IDS.flip(0), IDS)]
    for found, wanted in zip(alternating(model), fresh, strict=True):
        assert torch.equal(found, wanted)
    ids = IDS.clone()
    first = output(model, inputs_of(model), ids)
    ids.copy_((ids + 1) % 3)  # the same tensor, with other tasks in it
    assert not torch.equal(output(model, inputs_of(model), ids), first)
    assert torch.equal(output(model, inputs_of(model), ids), output(copy.deepcopy(model), inputs_of(model), ids))
