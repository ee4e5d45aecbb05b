"""Composing: the model starts as its backbone, tasks have names, what does not fit is refused in time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.initial import check_alive
from mixwright.methods.tensorpoly.model import TaskComposedModel
from mixwright.ops.digest import tensor_digest

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "poly": {"rank": 2, "num_latent": 3},
    "mhr": {"rank": 2, "num_latent": 3, "heads": 4},
    "tlora": {"rank": 2, "num_latent": 2},
    "tensorpoly-1": {"rank": 2, "num_latent": 3},
    "tensorpoly-2": {"rank": 2, "num_latent": 3, "order": 3},
    "entangled": {"rank": 2, "num_latent": 2, "groups": 3, "order": 4, "factorization": "exact"},
}
TASKS = ("nli", "paraphrase", "sentiment")


def composed(kind: str, family: str = "t5", **settings: Any) -> TaskComposedModel:
    model = mw.compose(
        "tensorpoly", backbone=tiny_backbone(family), tasks=list(TASKS), experts=kind, **{**KINDS[kind], **settings}
    )
    assert isinstance(model, TaskComposedModel)
    return model


def awake(model: TaskComposedModel, size: float = 0.7) -> TaskComposedModel:
    """Every added parameter drawn anew, so that experts act and tasks differ."""
    draw = torch.Generator().manual_seed(1)
    for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        parameter.data = size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    for mixture in model.mixtures.values():
        mixture.experts.forget()  # type: ignore[operator]
    return model


def first(model: nn.Module, seed: int = 3, **extra: Any) -> Tensor:
    with torch.no_grad():
        return model(**(example_inputs(getattr(model, "backbone", model), seed) or {}), **extra)[0]


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_model_is_its_backbone_to_the_bit(kind: str, family: str) -> None:
    want = first(tiny_backbone(family))
    model = composed(kind, family)
    with model.with_task(["nli", "sentiment"]):
        assert torch.equal(first(model), want)
    assert torch.equal(first(model.remove()), want)


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_has_a_gradient_by_the_second_step(kind: str) -> None:
    model = composed(kind, "llama", target_modules=["q_proj", "down_proj"])
    added = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(added.values(), lr=0.1)
    inputs = example_inputs(model.backbone) or {}
    for _ in range(2):
        optimiser.zero_grad()
        with model.with_task([0, 1]):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
    for name, parameter in added.items():
        assert parameter.grad is not None, name
        if "experts" in name:
            assert not (parameter.grad == 0).all(), name
        elif model.cost().router:
            assert (parameter.grad[:2] != 0).any() and not parameter.grad[2].any(), "the third task did not occur"


def test_dead_entries_are_those_without_a_gradient() -> None:
    model = awake(composed("tensorpoly-1", "gpt2", target_modules=["c_proj"], order=4, rank=2))
    with model.with_task(0):
        (model(**(example_inputs(model.backbone) or {}))[0] ** 2).sum().backward()
    experts = [p for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    unread = sum(int((p.grad == 0).sum()) for p in experts if p.grad is not None)
    assert unread == model.cost().dead > 0
    assert composed("tensorpoly-1", "gpt2", order=4, factorization="exact").cost().dead == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_named_by_name_by_id_or_row_by_row(kind: str) -> None:
    model = awake(composed(kind))
    with model.with_task("sentiment"):
        named = first(model)
    with model.with_task(2):
        numbered = first(model)
    with model.with_task(["nli", 2]):
        rows = first(model)
    assert torch.equal(named, numbered)
    assert torch.allclose(rows[1], named[1], atol=1e-5)
    assert torch.allclose(first(model, task_ids=torch.tensor([0, 2])), rows, atol=1e-6)
    differ = not torch.allclose(rows[0], named[0], atol=1e-4)
    assert differ == (kind not in ("lora", "tlora"))


def test_an_unknown_task_gets_the_nearest() -> None:
    model = composed("poly")
    with pytest.raises(ValueError, match="no task 'sentimnt' in this model; did you mean 'sentiment'"):
        model.with_task("sentimnt").__enter__()
    for strange in (3, -1, True):
        with pytest.raises(ValueError, match="it has 3, with ids from 0"):
            model.with_task(strange).__enter__()
    with pytest.raises(ValueError, match="give one task for each row"):
        model.with_task([]).__enter__()
    with model.with_task(["nli", "nli", "sentiment"]), pytest.raises(ValueError, match="3 rows but the pass has 2"):
        first(model)
    with pytest.raises(ValueError, match=r"holds 7, but this router knows 3 tasks"):
        first(model, task_ids=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="task router needs"):
        first(model)


@pytest.mark.parametrize("share", ["layer", "block", "model"])
def test_routers_are_shared_as_asked(share: str) -> None:
    model = composed("tensorpoly-1", "llama", share=share)
    routers = {site: id(mixture.router) for site, mixture in model.mixtures.items()}
    assert len(set(routers.values())) == {"layer": 14, "block": 2, "model": 1}[share]
    blocks = {site: site.split(".")[2] for site in routers}
    if share == "block":
        assert all((routers[a] == routers[b]) == (blocks[a] == blocks[b]) for a in routers for b in routers)
    assert model.cost().router == len(set(routers.values())) * 3 * 3
    assert model.cost().trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_seed_decides_and_the_experts_know_nothing_of_tasks() -> None:
    one, again, other = (composed("entangled", seed=seed).added_state() for seed in (4, 4, 5))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if one[name].any())
    shared = mw.compose(
        "tensorpoly", backbone=tiny_backbone("t5"), tasks=["a"], experts="entangled", share="model", seed=4,
        **KINDS["entangled"],
    ).added_state()  # fmt: skip
    assert all(torch.equal(one[name], shared[name]) for name in one if ".experts." in name)


def test_the_routing_table_has_every_task_of_every_site() -> None:
    model = awake(composed("tensorpoly-2"))
    table = model.routing_table()
    assert list(table) == list(model.mixtures)
    assert all(rows.shape == (3, 3, 3) and torch.allclose(rows.sum(-1), torch.ones(3, 3)) for rows in table.values())
    assert all(torch.equal(rows, torch.ones(3, 2)) for rows in composed("tlora").routing_table().values())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tasks": ({"tasks": []}, "tasks: missing; tensorpoly-1 mixes its experts per task"),
    "twice": ({"tasks": ["a", "b", "a"]}, "'a' stands there twice"),
    "empty name": ({"tasks": ["a", " "]}, "one name is empty"),
    "order": ({"order": 0}, "order=0: expected a whole number of at least 1"),
    "order too large": ({"order": 5}, "order=5: expected 1 to 4"),
    "rank": ({"rank": 0}, "rank=0: expected a whole number of at least 1"),
    "latent": ({"num_latent": -1}, "num_latent=-1"),
    "heads divide": (
        {"experts": "mhr", "heads": 64},
        r"heads=64 does not divide d_in=32 of encoder\.block\.0\.layer\.0\.SelfAttention\.q; .*: 1, 2, 4, 8, 16\.",
    ),
    "heads of poly": ({"experts": "poly", "heads": 4}, "heads=4: poly has one head; only mhr has several"),
    "heads of tensors": ({"heads": 4}, "heads=4: tensorpoly-1 has one head"),
    "groups of II": ({"experts": "tensorpoly-2", "groups": 2}, "groups=2: tensorpoly-2 has one group"),
    "many loras": ({"experts": "lora", "num_latent": 4}, "lora is one expert; choose poly"),
    "norm of poly": ({"experts": "poly", "norm": "pair"}, "norm='pair': poly has no pairs"),
    "norm of one leaf": ({"order": 1, "norm": "pair"}, "norm='pair': order 1 has no pairs"),
    "order of poly": ({"experts": "poly", "order": 4}, "order=4: poly has no tensor products"),
    "radices of poly": ({"experts": "poly", "factorization": "exact"}, "poly has no leaves"),
    "kind": ({"experts": "tensorpoly"}, "experts: expected 'lora', 'poly'"),
    "unknown": ({"ranks": 4}, "unknown key; did you mean 'rank'"),
    "site": ({"target_modules": ["nowhere"]}, "no site is named 'nowhere'"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0: expected more than 0"),
    "schedule": ({"warmup": 0.2}, "expected shares of the steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_backbone_is_touched(case: str) -> None:
    settings, message = REFUSED[case]
    backbone = tiny_backbone("t5")
    before, modules = tensor_digest(backbone), [type(module) for module in backbone.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        mw.compose("tensorpoly", backbone=backbone, **{"tasks": ["a", "b"], **settings})
    assert "\n" not in str(caught.value)
    assert tensor_digest(backbone) == before and [type(module) for module in backbone.modules()] == modules
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_a_catalogue_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="latent experts of its own"):
        mw.compose("tensorpoly", backbone=tiny_backbone("t5"), catalog=tmp_path / "shelf", tasks=["a"])


def test_two_zero_factors_are_refused() -> None:
    some, zero = torch.ones(2, 3), torch.zeros(2, 3)
    check_alive([some, some], [some, zero], "here")
    with pytest.raises(ValueError, match=r"here: up\.0 and up\.1 are zero throughout.*forever"):
        check_alive([some, some], [zero, zero], "here")
    with pytest.raises(ValueError, match=r"down\.1 and up\.0"):
        check_alive([some, zero], [zero, some], "here")


def test_settling_leaves_nothing_open_and_settles_once() -> None:
    for kind in KINDS:
        settled = TensorPolyConfig(experts=kind, tasks=TASKS).settled()  # type: ignore[arg-type]
        assert None not in (settled.rank, settled.num_latent, settled.heads, settled.groups, settled.norm)
        assert settled.settled() == settled
    assert TensorPolyConfig(init="released").settled().norm == "pair"
    assert TensorPolyConfig(init="released", experts="poly").settled().norm == "none"


@pytest.mark.parametrize("family", ["t5", "llama", "bart"])
@pytest.mark.parametrize("kind", ["mhr", "tensorpoly-1", "entangled"])
def test_beams_over_mixed_tasks_are_each_tasks_own_beams(kind: str, family: str) -> None:
    model = awake(composed(kind, family)).eval()
    words = (example_inputs(model.backbone, 5) or {})["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 5}
    with model.with_task(["sentiment", "nli"]):
        together = model.generate(words, **options)
    assert torch.equal(model.generate(words, task_ids=torch.tensor([2, 0]), **options), together)
    for row, task in enumerate(("sentiment", "nli")):
        with model.with_task(task):
            alone = model.generate(words[row : row + 1], **options)
        assert torch.equal(alone, together[2 * row : 2 * row + 2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_backbone_keeps_wide_leaves_and_its_own_answers(dtype: torch.dtype) -> None:
    want = first(tiny_backbone("llama").to(dtype))
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama").to(dtype), tasks=TASKS, order=4, init="matched")
    with model.with_task("nli"):  # type: ignore[operator]
        assert torch.equal(first(model), want)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    near = mw.compose("tensorpoly", backbone=tiny_backbone("llama").to(dtype), tasks=TASKS, order=4, init="released")
    with near.with_task("nli"), torch.no_grad():  # type: ignore[operator]
        down, _ = next(iter(near.mixtures.values())).experts.factors(torch.full((1, 8), 1 / 8))  # type: ignore[operator]
    assert (down != 0).all(), "no product underflows"
