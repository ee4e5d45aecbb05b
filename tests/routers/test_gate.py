"""Prototype scores: exact, cached, kept wide, and dropped when the gates change."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.routers.gate import PrototypeScores, SigmoidGate
from mixwright.routing import Condition


def numpy_scores(x, gates):
    def standard(v):
        v = np.asarray(v, dtype=np.float64)
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)

    return standard(x) @ standard(gates).T / math.sqrt(gates.shape[-1])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(2, 70), st.integers(1, 20), st.integers(0, 99))
def test_scores_agree_with_float64(tokens, width, experts, seed):
    x, gates = random(tokens, width, seed=seed), random(experts, width, seed=seed + 100)
    found = PrototypeScores(gates)(x)
    assert found.shape == (tokens, experts) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), numpy_scores(x, gates), atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 50), st.floats(-5, 5), st.integers(0, 99))
def test_scores_ignore_positive_scale_and_shift_and_flip_with_the_sign(scale, shift, seed):
    x, gates = random(4, 48, seed=seed, dtype=torch.float64), random(5, 48, seed=seed + 1, dtype=torch.float64)
    scores = PrototypeScores(gates)(x)
    # eps = 1e-5 beside a variance of scale^2: exact up to that.
    close = {"atol": 5e-5 * (1 + scale**-2), "rtol": 0}
    torch.testing.assert_close(PrototypeScores(gates)(scale * x + shift), scores, **close)
    torch.testing.assert_close(PrototypeScores(scale * gates + shift)(x), scores, **close)
    torch.testing.assert_close(PrototypeScores(gates)(-scale * x + shift), -scores, **close)


def test_a_zero_gate_scores_exactly_zero():
    gates = random(3, 33)
    gates[1] = 0.0
    assert (PrototypeScores(gates)(random(20, 33))[:, 1] == 0).all()


def test_standardised_rows_are_made_once_and_anew_after_any_change():
    scores = PrototypeScores(random(3, 8))
    made = []
    derive = scores._rows.derive
    scores._rows.derive = lambda *a: made.append(1) or derive(*a)
    x, fresh = random(2, 8, seed=1), random(3, 8, seed=2)
    for _ in range(3):
        scores(x)
    assert len(made) == 1
    for change in (
        lambda: scores.prototypes.copy_(fresh),
        lambda: scores.load_state_dict({"prototypes": -fresh}),
        lambda: setattr(scores, "prototypes", 2 * fresh + random(3, 8, seed=5)),
        lambda: setattr(scores.prototypes, "data", random(3, 8, seed=6)),
        lambda: scores.double(),
    ):
        change()
        expected = numpy_scores(x, scores.prototypes.numpy())
        np.testing.assert_allclose(scores(x).numpy(), expected, atol=1e-5)
        scores(x)
    assert len(made) == 6


def test_what_is_saved_are_the_raw_gates():
    gates = random(3, 8)
    scores = PrototypeScores(gates)
    scores(random(2, 8))
    assert list(scores.state_dict()) == ["prototypes"]
    assert torch.equal(scores.state_dict()["prototypes"], gates)


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_gates_stay_float32_when_the_model_is_cast(cast):
    gates = random(3, 64)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), PrototypeScores(gates))
    scores = getattr(model, cast)()[1]
    assert scores.prototypes.dtype == torch.float32 and torch.equal(scores.prototypes, gates)
    x = random(5, 64, seed=1).to(next(model.parameters()).dtype)
    assert scores(x).dtype == torch.float32
    np.testing.assert_allclose(scores(x).numpy(), numpy_scores(x.float(), gates), atol=1e-5)
    assert scores.to("meta").prototypes.device.type == "meta"


def test_scores_stay_float32_under_autocast():
    gates, x = random(3, 64), random(5, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PrototypeScores(gates)(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), numpy_scores(x, gates), atol=1e-5)


def test_rows_made_in_inference_mode_serve_a_pass_with_gradients():
    gates, x = random(3, 8), random(2, 8, seed=1)
    scores = PrototypeScores(gates)
    with torch.inference_mode():
        scores(x)
    leaf = x.clone().requires_grad_()
    scores(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    with torch.inference_mode():
        made_there = PrototypeScores(random(3, 8))
        made_there(x)
        made_there.prototypes.copy_(-gates)
        torch.testing.assert_close(made_there(x), -scores(x))


def test_gradients_of_scores_equal_finite_differences():
    scores = PrototypeScores(random(3, 7, dtype=torch.float64))
    assert torch.autograd.gradcheck(scores, random(4, 7, seed=1, dtype=torch.float64).requires_grad_())


def test_copies_and_pickles_have_no_memory_and_equal_scores():
    scores, x = PrototypeScores(random(3, 8)), random(2, 8, seed=1)
    expected = scores(x)
    twin = copy.deepcopy(scores)
    assert torch.equal(twin(x), expected)
    buffer = io.BytesIO()
    torch.save(scores, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    twin.prototypes.neg_()
    assert torch.equal(scores(x), expected) and torch.equal(twin(x), -expected)


def test_a_gate_of_zeros_lets_half_through():
    assert (SigmoidGate(8)(random(2, 3, 8), Condition()).weights == 0.5).all()


def test_a_sigmoid_gate_computes_in_float32_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    gate, x = SigmoidGate(32), torch.randn(5, 32, generator=draw)
    gate.gate.data.normal_(generator=draw)
    expected = gate(x, Condition()).weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(x, Condition()).weights, expected)
