"""A model that grows gives the answers that it gave: at every step, for every task, and after saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.methods.tensorpoly.model import TaskComposedModel

TASKS = ["nli", "paraphrase", "sentiment"]
Grow = Callable[[TaskComposedModel], Any]


def composed(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> TaskComposedModel:
    model = mw.compose(
        "tensorpoly", backbone=tiny_backbone("llama"), tasks=TASKS, experts=kind, target_modules=["o_proj", "up_proj"],
        **{"rank": 3, **settings},
    )  # fmt: skip
    assert isinstance(model, TaskComposedModel)
    draw = torch.Generator().manual_seed(1)
    model = model.to(dtype)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.copy_(0.8 * torch.randn(parameter.shape, generator=draw))
    return model


def outputs(model: TaskComposedModel) -> Tensor:
    inputs, found = example_inputs(model.backbone, 9) or {}, list[Tensor]()
    for task in TASKS:
        with torch.no_grad(), model.with_task(task):
            found.append(model(**inputs)[0])
    return torch.stack(found)


STEPS: dict[str, tuple[str, dict[str, Any], Grow, dict[str, Any]]] = {
    "TLoRA, more terms": ("tlora", {}, lambda m: m.grow_terms(3), {"num_latent": 3}),
    "TLoRA, fivefold": ("tlora", {"order": 4}, lambda m: m.grow_terms(5), {"num_latent": 5}),
    "TLoRA, exact radices": ("tlora", {"order": 3, "factorization": "exact"}, lambda m: m.grow_terms(2), {}),
    "TLoRA, routed": ("tlora", {"num_latent": 3}, lambda m: m.grow_router(), {"experts": "tensorpoly-1"}),
    "TLoRA of one term, routed": ("tlora", {"norm": "pair"}, lambda m: m.grow_router(), {"norm": "pair"}),
    "LoRA, routed": ("lora", {}, lambda m: m.grow_router(TASKS), {"experts": "poly"}),
    "Poly, more skills": ("poly", {"num_latent": 2}, lambda m: m.grow_terms(3), {"num_latent": 3}),
    "MHR, more skills": ("mhr", {"num_latent": 2, "heads": 4}, lambda m: m.grow_terms(4), {"num_latent": 4}),
    "I, more terms": ("tensorpoly-1", {"num_latent": 3}, lambda m: m.grow_terms(8), {"num_latent": 8}),
    "I with norm, more terms": (
        "tensorpoly-1", {"num_latent": 2, "norm": "pair"}, lambda m: m.grow_terms(5), {"norm": "pair"}
    ),
    "II, more terms": ("tensorpoly-2", {"num_latent": 2, "order": 3}, lambda m: m.grow_terms(4), {}),
    "II with norm, more terms": ("tensorpoly-2", {"num_latent": 2, "norm": "pair"}, lambda m: m.grow_terms(3), {}),
    "entangled, more terms": ("entangled", {"num_latent": 2, "groups": 3}, lambda m: m.grow_terms(3), {"groups": 3}),
    "I, entangled": ("tensorpoly-1", {"num_latent": 3}, lambda m: m.grow_order(), {"groups": 3}),
    "I of order 4, entangled": (
        "tensorpoly-1", {"num_latent": 2, "order": 4, "share": "block"}, lambda m: m.grow_order(), {"order": 4}
    ),
    "I of one term, II": (
        "tensorpoly-1", {"num_latent": 1, "norm": "pair"}, lambda m: m.grow_order("tensorpoly-2"), {"groups": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("step", STEPS)
def test_growing_changes_no_answer(step: str, dtype: torch.dtype, error: float) -> None:
    kind, settings, grow, expected = STEPS[step]
    model = composed(kind, dtype, **settings)
    before, stored = outputs(model), model.cost().stored
    with model.disabled():
        backbone = outputs(model)
    assert (before - backbone).abs().max() > 1e-3, "the experts act"
    grow(model)
    after = outputs(model)
    assert (after - before).abs().max() <= error * before.abs().max()
    assert after.dtype == dtype and model.cost().stored >= stored
    for key, value in expected.items():
        assert getattr(model.settings, key) == value
    assert model.experts == tuple(f"latent-{i}" for i in range(model.settings.num_latent or 0))


def test_the_whole_way_up_and_onto_a_disk(tmp_path: Path) -> None:
    model = composed("tlora", share="block")
    before = outputs(model)
    for grow in (lambda: model.grow_terms(2), model.grow_router, lambda: model.grow_terms(3), model.grow_order):
        grow()
        assert (outputs(model) - before).abs().max() <= 1e-12 * before.abs().max()
    assert model.settings.experts == "entangled" and model.cost().router == 2 * 3 * 2 * 3, "two blocks, two positions"
    model = model.float()
    model.save_pretrained(tmp_path / "grown")
    loaded = mw.load(tmp_path / "grown", backbone=tiny_backbone("llama"))
    assert isinstance(loaded, TaskComposedModel) and loaded.settings == model.settings
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.cost() == model.cost()


@pytest.mark.parametrize("step", [name for name in STEPS if "more" in name or "fivefold" in name])
def test_copies_part_when_they_learn(step: str) -> None:
    kind, settings, grow, _ = STEPS[step]
    model = composed(kind, **settings)
    held = model.settings.num_latent or 1
    grow(model)
    inputs = example_inputs(model.backbone) or {}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for tasks in ([0, 1], [2, 0]):
        optimiser.zero_grad()
        with model.with_task(tasks):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimiser.step()
    for mixture in model.mixtures.values():
        for side in ("down", "up"):
            parts = [t for name, t in mixture.experts.named_parameters() if name.split(".")[0] == side]
            assert any(not torch.allclose(part[0], part[held], rtol=1e-6, atol=0) for part in parts), side


def test_two_is_refused_with_the_change_that_it_would_make_and_allowed_by_name() -> None:
    model = composed("tensorpoly-1", num_latent=3)
    before, state = outputs(model), {name: t.clone() for name, t in model.added_state().items()}
    with pytest.raises(ValueError, match=r"would change by \d+\.\d% for task '\w+' at model\.layers\.\d"):
        model.grow_order("tensorpoly-2")
    assert model.settings.experts == "tensorpoly-1" and torch.equal(outputs(model), before)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.added_state().items())
    change = model.grow_order("tensorpoly-2", tolerance=10.0)
    assert 0.01 < change < 10 and model.settings.experts == "tensorpoly-2"


def test_one_hot_rows_become_two_exactly() -> None:
    model = composed("tensorpoly-1", num_latent=3, order=3)
    with torch.no_grad():
        for mixture in model.mixtures.values():
            mixture.router.get_parameter("logits").copy_(80 * torch.eye(3) - 40)
    before = outputs(model)
    assert model.grow_order("tensorpoly-2") < 1e-11, "the normalisation's 1e-12, once for each position"
    assert (outputs(model) - before).abs().max() <= 1e-11 * before.abs().max()


REFUSED: dict[str, tuple[str, dict[str, Any], Grow, str]] = {
    "fewer": ("poly", {}, lambda m: m.grow_terms(8), "num_latent=8: the model has 8 latent experts"),
    "norm": ("tlora", {"norm": "pair"}, lambda m: m.grow_terms(2), "grow_router first"),
    "norm, router": ("tlora", {"norm": "pair", "num_latent": 2}, lambda m: m.grow_router(), "while there is one term"),
    "norm, order": ("tensorpoly-1", {"norm": "pair"}, lambda m: m.grow_order(), "only norm='none' is exact"),
    "lora": ("lora", {}, lambda m: m.grow_terms(2), "grow_router makes it a Poly"),
    "routed": ("poly", {}, lambda m: m.grow_router(), "poly has weights per task already"),
    "order": ("poly", {}, lambda m: m.grow_order(), "only tensorpoly-1 grows weights per order"),
    "to": ("tensorpoly-1", {}, lambda m: m.grow_order("poly"), "to='poly': expected tensorpoly-2 or entangled"),
    "straight": ("poly", {"straight_through": True}, lambda m: m.grow_terms(9), "grow without it"),
    "others": ("lora", {}, lambda m: m.grow_router(["a"]), "the model has its own, nli, paraphrase, sentiment"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_growth_that_would_not_be_exact_is_refused(case: str) -> None:
    kind, settings, grow, message = REFUSED[case]
    model = composed(kind, **{"rank": 2, **settings, **({"heads": 4} if kind == "mhr" else {})})
    before, config = model.added_state(), model.settings
    with pytest.raises(ValueError, match=message):
        grow(model)
    assert model.settings == config
    assert all(torch.equal(before[name], tensor) for name, tensor in model.added_state().items())


def test_a_router_needs_tasks() -> None:
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), experts="tlora", rank=2)
    with pytest.raises(ValueError, match="tasks: missing"):
        model.grow_router()  # type: ignore[operator]
    with pytest.raises(ValueError, match="'a' stands there twice"):
        model.grow_router(["a", "a"])  # type: ignore[operator]
    model.grow_router(["only"])  # type: ignore[operator]
    assert model.tasks == ("only",)
