"""The regularised objective: weights that mean the same for every batch, and gradients where they belong."""

from math import log
from typing import Any

import pytest
import torch

from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.objective import Regularised, information, objective, overlap, prior, surplus
from mixwright.methods.tensorpoly.task_rows import task_routers
from mixwright.ops import collapse
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import ParamGroup, Stage

from .teacher import HALVES, knowing, shots


def config(**weights: float) -> TensorPolyConfig:
    return TensorPolyConfig(tasks=("a",), **weights)


def test_nothing_is_weighed_in_unless_asked() -> None:
    assert objective(config()) is supervised
    assert objective(config(ibp=0.1)) == Regularised(0.0, 0.0, 0.0, 0.1)
    assert objective(config(sparsity=0.2)) == Regularised(0.0, 0.0, 0.2, 0.0)


def test_a_weight_means_the_same_whatever_the_batch_holds() -> None:
    model = knowing().train()
    whole = Regularised(0.5, 0.2, 0.3, 0.1)
    penalty = whole.penalty(model).item()
    data = shots(model, 8, like=HALVES)
    for rows in (1, 8):
        batch = data.take(slice(0, rows))
        with torch.no_grad(), model.train().with_task("one"):
            added = float(whole(model, batch) - supervised(model, batch)) / batch.weight
        assert added == pytest.approx(penalty, rel=1e-4)
    parts = -0.5 * information(model) + 0.2 * overlap(model) + 0.3 * surplus(model) + 0.1 * prior(model)
    assert penalty == pytest.approx(parts.item(), rel=1e-6) and penalty != 0


def test_held_out_data_are_scored_without_it() -> None:
    model = knowing().eval()
    batch = shots(model, 2, like=HALVES).take(slice(0, 2))
    with torch.no_grad(), model.with_task("one"):
        assert torch.equal(Regularised(1.0, 1.0, 1.0, 1.0)(model, batch), supervised(model, batch))


def test_terms_are_means_over_routers_and_sites() -> None:
    model = knowing("tensorpoly-2")
    tables = [router.table() for router in task_routers(model)]
    of_each = [collapse.mutual_information(table[:, n]) / log(4) for table in tables for n in range(2)]
    assert information(model).item() == pytest.approx(torch.stack(of_each).mean().item(), rel=1e-6)
    assert 0.5 < information(model).item() <= 1.0  # four tasks, four experts, sharp
    of_each = [collapse.indian_buffet(r.logits[:, n]) / 16 for r in task_routers(model) for n in range(2)]
    assert prior(model).item() == pytest.approx(torch.stack(of_each).mean().item(), rel=1e-6)


def test_open_gates_count_beyond_one_for_each_task() -> None:
    model = knowing()
    assert surplus(model).item() == 0.0  # sharp: one gate is open
    with torch.no_grad():
        task_routers(model)[0].logits.zero_()
    assert surplus(model).item() == pytest.approx((0.5 - 0.25) / len(task_routers(model)))


def built_overlap(factors: torch.Tensor) -> float:
    """mean over pairs of experts of (mean cosine of their columns)^2 - 1/R, from factors (experts, columns, width)."""
    cosines = torch.nn.functional.cosine_similarity(factors[:, None], factors[None], dim=-1).mean(-1)
    return cosines.square().mean().item() - 1 / len(factors)


def test_overlap_is_that_of_the_factors_the_experts_would_build() -> None:
    model = knowing("tensorpoly-1", factorization="exact")
    found = []
    for mixture in model.mixtures.values():
        experts: Any = mixture.experts
        found += [built_overlap(side.detach()) for side in experts.factors(torch.eye(4))]
    assert overlap(model).item() == pytest.approx(sum(found) / len(found), rel=1e-4)


@pytest.mark.parametrize(("kind", "settings"), [("mhr", {"heads": 2}), ("entangled", {}), ("tlora", {"num_latent": 3})])
def test_every_kind_has_gradients_for_what_it_learns(kind: str, settings: dict[str, Any]) -> None:
    model = knowing(kind, **settings)
    Regularised(1.0, 1.0, 1.0, 1.0).penalty(model).backward()
    learned = {name: p for name, p in model.named_parameters() if ".experts." in name or name.endswith("router.logits")}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in learned.values())
    assert learned and all(p.grad is None for name, p in model.named_parameters() if name not in learned)


def test_training_with_information_tells_tasks_apart_that_data_alone_do_not() -> None:
    separations = []
    for weight in (0.0, 1.0):
        model = knowing()
        with torch.no_grad():
            for router in task_routers(model):
                router.logits.uniform_(-1e-3, 1e-3, generator=torch.Generator().manual_seed(0))
        groups = (ParamGroup(select=("*.router.logits",), lr=0.1),)
        stage = Stage(name="s", groups=groups, steps=30, objective=objective(config(mutual_information=weight)))
        data = shots(model, 8, like=HALVES)
        with model.with_task(["zero", "one", "two", "three"] * 2):
            fit(model, stage, data, config=TrainConfig(batch_size=8))
        separations.append(information(model).item())
    assert separations[1] > 0.1 and separations[1] > 3 * separations[0]
