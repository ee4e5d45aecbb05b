"""Experts that are masks: what they share, what is counted of them, and what training may not touch."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.experts.dense_deltas import DenseDeltas
from mixwright.experts.maskable import maskable
from mixwright.experts.overlap import overlap
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.ops import kernels
from mixwright.ops.hard_concrete import DEAD, LIMIT, mask
from mixwright.routing import Routing

SHAPES = {"a.weight": torch.Size((5, 4)), "a.bias": torch.Size((5,)), "scale": torch.Size(())}


def pool(granularity: Any = "weight", experts: int = 3, **options: Any) -> SparseDeltas:
    deltas = SparseDeltas(SHAPES, experts, granularity, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in deltas.delta.values():
            delta.copy_(torch.randn(delta.shape, generator=draw))
        for logits in deltas.logits.values():
            logits.copy_(2 * torch.randn(logits.shape, generator=draw))
    return deltas


def base() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def over_weights(masks: Tensor, shape: torch.Size) -> Tensor:
    return masks.reshape(*masks.shape, *[1] * (len(shape) + 1 - masks.dim())).expand(3, *shape).reshape(3, -1)


def routing(*weights: float) -> Routing:
    return Routing(torch.tensor(weights), len(weights))


@pytest.mark.parametrize("granularity", ["weight", "row", "tensor"])
def test_the_merge_is_the_base_and_the_change(granularity: str) -> None:
    deltas, theta, routed = pool(granularity), base(), routing(0.5, 0.2, 0.3)
    change, moved = deltas(routed), deltas.onto(theta, routed, 0.5)
    for name in SHAPES:
        torch.testing.assert_close(moved[name], theta[name] + 0.5 * change[name])
        untouched = change[name] == 0
        assert torch.equal(moved[name][untouched], theta[name][untouched])


@pytest.mark.parametrize("granularity", ["weight", "row", "tensor"])
def test_sparsity_is_counted_over_weights_and_is_what_is_served(granularity: str) -> None:
    deltas, theta = pool(granularity), base()
    total = sum(tensor.numel() for tensor in theta.values())
    assert deltas.num_weights == total
    for expert, counted in enumerate(deltas.sparsity().tolist()):
        served = deltas.onto(theta, routing(*(float(i == expert) for i in range(3))))
        same = sum(int((served[name] == theta[name]).sum()) for name in theta)
        assert counted == pytest.approx(same / total)
    smooth = {name: torch.sigmoid(deltas.logits[name.replace(".", "/")] - DEAD) for name in SHAPES}
    weighted = sum(smooth[name].reshape(3, -1).mean(1) * SHAPES[name].numel() for name in SHAPES) / total
    torch.testing.assert_close(deltas.expected_l0(), weighted)


@pytest.mark.parametrize("granularity", ["weight", "row", "tensor"])
def test_overlap_is_counted_over_weights(granularity: str) -> None:
    deltas = pool(granularity)
    acting = torch.cat([over_weights(deltas.masks(name) != 0, shape) for name, shape in SHAPES.items()], 1)
    found = overlap(deltas)
    torch.testing.assert_close(found.density, acting.float().mean(1))
    torch.testing.assert_close(found.density, 1 - deltas.sparsity())
    assert found.union == pytest.approx(acting.any(0).float().mean().item())
    for i, j in itertools.product(range(3), range(3)):
        both, either = (acting[i] & acting[j]).sum(), (acting[i] | acting[j]).sum()
        assert found.iou[i, j].item() == pytest.approx((both / either.clamp_min(1)).item())
    assert overlap(deltas, ("a.bias",)).density[0] == acting[0, 20:25].float().mean()


def test_the_chance_of_overlap_is_what_independent_masks_have() -> None:
    deltas = SparseDeltas({"w": torch.Size((400, 300))}, 3)
    with torch.no_grad():
        deltas.logits["w"].copy_(torch.where(torch.rand(3, 400, 300) < 0.1, LIMIT, -LIMIT))
    found = overlap(deltas)
    off = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(found.iou[off], found.chance[off], atol=4e-3, rtol=0)
    assert found.chance[0, 1].item() == pytest.approx(0.0526, abs=4e-3)
    assert not found.fractional.any()


def test_after_a_step_logits_are_within_their_limits() -> None:
    deltas = pool()
    with torch.no_grad():
        deltas.logits["a/weight"].mul_(100)
    deltas.after_step()
    assert deltas.logits["a/weight"].abs().max() == torch.tensor(LIMIT)


def stepped(deltas: SparseDeltas, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(deltas.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        moved = deltas.onto(base(), routing(0.4, 0.3, 0.3))
        (sum((tensor - 1).square().sum() for tensor in moved.values()) + deltas.expected_l0().sum()).backward()
        optimizer.step()
        deltas.after_step()


def test_a_frozen_expert_is_the_same_to_the_bit_after_training_and_the_others_are_not() -> None:
    deltas = pool().train()
    alone = [routing(*(float(i == expert) for i in range(3))) for expert in range(3)]
    before = [deltas.onto(base(), one) for one in alone]
    deltas.freeze(1)
    stepped(deltas)
    after = [deltas.onto(base(), one) for one in alone]
    same = [all(torch.equal(a[name], b[name]) for name in SHAPES) for a, b in zip(before, after, strict=True)]
    assert same == [False, True, False]
    deltas.freeze(1, frozen=False)
    stepped(deltas)
    thawed = deltas.onto(base(), alone[1])
    assert not all(torch.equal(thawed[name], before[1][name]) for name in SHAPES)


def test_regrowth_brings_masks_back_that_died_and_without_it_they_stay_dead() -> None:
    def alive(regrowth: float) -> int:
        deltas = pool(regrowth=regrowth).train()
        with torch.no_grad():
            for logits in deltas.logits.values():
                logits.fill_(-2.0)
        optimizer = torch.optim.SGD(deltas.logits.values(), lr=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            moved = deltas.onto({name: torch.zeros(shape) for name, shape in SHAPES.items()}, routing(0.4, 0.3, 0.3))
            sum(
                (moved[name] - deltas.delta[name.replace(".", "/")].detach()).square().sum() for name in SHAPES
            ).backward()
            optimizer.step()
        return int((deltas.sparsity() < 1).sum())

    assert alive(0.0) == 0
    assert alive(0.1) == 3


def test_noise_is_drawn_in_training_alone_and_from_the_seed_of_the_pass() -> None:
    deltas, routed = pool(noise=True).train(), routing(0.4, 0.3, 0.3)
    torch.manual_seed(5)
    first = deltas.onto(base(), routed)
    second = deltas.onto(base(), routed)
    torch.manual_seed(5)
    again = deltas.onto(base(), routed)
    assert not torch.equal(first["a.weight"], second["a.weight"])
    assert torch.equal(first["a.weight"], again["a.weight"])
    still = deltas.eval().onto(base(), routed)
    assert torch.equal(still["a.weight"], pool().eval().onto(base(), routed)["a.weight"])


def test_binarised_masks_are_whole_and_one_expert_that_is_binary_is_unchanged() -> None:
    deltas, theta = pool(), base()
    fractions = {name: deltas.masks(name).detach() for name in SHAPES}
    before = {name: deltas.delta[name.replace(".", "/")].detach().clone() for name in SHAPES}
    deltas.binarise()
    for name in SHAPES:
        z, b = fractions[name], deltas.masks(name)
        assert torch.equal(b, (z >= 0.5).float())
        nearest = before[name] * torch.where(b.any(0), (z * b).sum(0) / b.sum(0).clamp_min(1), 1.0)
        torch.testing.assert_close(deltas.delta[name.replace(".", "/")].detach(), nearest)
    served = deltas.onto(theta, routing(0.2, 0.5, 0.3))
    deltas.binarise()
    assert all(torch.equal(deltas.onto(theta, routing(0.2, 0.5, 0.3))[name], served[name]) for name in SHAPES)
    assert not overlap(deltas).fractional.any()


@pytest.fixture
def calls(compiled: kernels.Kernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled functions, as they are called."""
    seen: list[str] = []

    def spy(name: str) -> Any:
        return lambda *given: (seen.append(name), getattr(compiled, name)(*given))[1]

    monkeypatch.setattr(kernels, "kernel", lambda: kernels.Kernels(*(spy(name) for name in kernels.Kernels._fields)))
    return seen


def test_binary_masks_are_served_by_their_bytes_with_the_same_bits(calls: list[str]) -> None:
    deltas, theta, routed = pool(experts=8).eval(), base(), routing(0.3, 0.1, 0.0, 0.2, 0.1, 0.05, 0.15, 0.1)
    deltas.binarise()
    plain = deltas.onto(theta, routed, 0.5)
    assert set(calls) == {"interpolate"}
    with torch.no_grad():
        calls.clear()
        served = deltas.onto(theta, routed, 0.5)
        assert set(calls) == {"interpolate_members"}
        assert all(torch.equal(served[name], plain[name]) for name in SHAPES)
        assert torch.equal(deltas.onto(theta, routed, 0.0)["a.weight"], theta["a.weight"])
        deltas.logits["a/bias"].fill_(-LIMIT)
        assert torch.equal(deltas.onto(theta, routed)["a.bias"], theta["a.bias"])
        deltas.logits["a/bias"].fill_(0.3)
        calls.clear()
        deltas.onto(theta, routed)
        assert calls.count("interpolate") == 1
        calls.clear()
        deltas.train().onto(theta, routed)
        assert "interpolate_members" not in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_deltas_are_the_base_until_they_learn(dtype: torch.dtype) -> None:
    deltas = DenseDeltas(SHAPES, 3)
    theta = {name: tensor.to(dtype) for name, tensor in base().items()}
    theta["a.bias"][0] = -0.0
    routed = routing(0.5, 0.2, 0.3)
    moved = deltas.onto(theta, routed)
    assert all(torch.equal(moved[name], theta[name]) for name in SHAPES)
    assert torch.signbit(moved["a.bias"][0])
    sum(tensor.float().sum() for tensor in moved.values()).backward()
    for name in SHAPES:
        grad = deltas.delta[name.replace(".", "/")].grad
        assert grad is not None
        torch.testing.assert_close(grad, routed.weights.reshape(3, *[1] * len(SHAPES[name])).expand(3, *SHAPES[name]))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.inner.weight
        self.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)


def test_maskable_parameters_are_each_tensor_once_and_no_buffer() -> None:
    model = Tied()
    assert list(maskable(model)) == ["inner.weight", "inner.bias", "norm.weight", "norm.bias", "head.bias"]
    assert list(maskable(model, ("head.*",))) == ["inner.weight", "head.bias"]
    assert list(maskable(model, ("*",), ("head.weight", "norm*"))) == ["inner.bias", "head.bias"]


def test_globs_that_choose_nothing_are_refused() -> None:
    for options in ({"include": ("heads.*",)}, {"exclude": ("heads.*",)}, {"exclude": ("*",)}):
        with pytest.raises(ValueError, match=r"selects none of|leave no parameter"):
            maskable(Tied(), **options)


def test_a_tied_backbone_is_changed_once() -> None:
    model = tiny_backbone("gpt2")
    shapes = maskable(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "transformer.wte.weight" in shapes and "lm_head.weight" not in shapes
    deltas = SparseDeltas(shapes, 2)
    assert deltas.num_weights == sum(parameter.numel() for parameter in model.parameters())
    assert mask(deltas.logits["transformer/wte/weight"]).shape[0] == 2
