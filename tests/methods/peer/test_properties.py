"""The property tests of the method's sheet, section (i), and where each of the nineteen stands.

|  # | what | where |
|----|------|-------|
|  1 | top k of all sums, brute force | ops/test_product_key.py |
|  2 | the staircase is complete and minimal | ops/test_product_key.py |
|  3 | outputs and gradients of a loop in float64 | here; paths: ops/test_neuron.py, ops/test_neuron_kernel.py |
|  4 | reach: more than k^2 experts are found | here |
|  5 | k = 1 is an MLP of h neurons; all of N is the dense layer | here; real layers: test_conversion.py |
|  6 | permuted heads, sub-keys, tokens | here |
|  7 | untouched rows stay | here; after optimiser steps: training/test_row_optimizers.py |
|  8 | several heads, one row; counts conserve | here |
|  9 | gates sum to one; a constant on all scores | here |
| 10 | pieces, batches, causality | here |
| 11 | determinism | here; threads: ops/test_neuron_kernel.py, ops/test_product_key.py |
| 12 | dense, compact and in-place optimisers agree | training/test_row_optimizers.py |
| 13 | memory of a pass does not grow with K d | here; backward: ops/test_neuron_kernel.py |
| 14 | layouts of others, there and back | test_layouts.py |
| 15 | shapes | here and test_layer.py |
| 16 | processes | routers/test_query_norm.py, experts/test_sharded_table.py |
| 17 | coverage, entropy, unevenness | routers/test_product_key.py, ops/test_spread.py |
| 18 | growth; quantised rows | test_growth.py, experts/test_quantised_table.py |
| 19 | speed as ratios in one run | here |
"""

import copy
import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixwright.methods.peer.layer import PEER
from mixwright.ops import kernels
from mixwright.ops.neuron import combine_neurons, neurons_reference
from mixwright.ops.product_key import product_key_top_k_reference
from mixwright.routing import Condition

from .oracle import peer_in_loops

D = 6


def layer(seed: int = 0, grid: tuple[int, int] = (4, 5), **options: object) -> PEER:
    torch.manual_seed(seed)
    given = {"heads": 2, "top_k": 3, "dim_key": 4, **options}
    made = PEER(given.pop("dim", D), grid, **given)  # type: ignore[arg-type]
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    return made.double()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: dict[str, dict[str, object]] = {
    "paper": {},
    "own-keys": {"share_keys": False, "query_norm": "none", "query_bias": True},
    "relu-layer": {"gate": "relu", "query_norm": "layer", "activation": "relu"},
    "sigmoid-rms-gated": {"gate": "sigmoid", "query_norm": "rms", "gated": True, "activation": "silu"},
    "renormalised-l2-narrow": {"gate": "renormalised", "query_norm": "l2", "row_dim": 3, "activation": "gelu_tanh"},
    "one-past": {"gate": "one", "query_norm": "past_batch", "activation": "relu_squared"},
    "values": {"values_only": True},
    "memory-plus": {"values_only": True, "output_gate": True, "share_keys": False},
    "gated-narrow": {"gated": True, "row_dim": 4},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_3_outputs_and_all_gradients_are_those_of_the_loop(options: dict[str, object], training: bool) -> None:
    made, x = layer(**options).train(training), tokens(7, D)
    wanted = [x, *made.parameters()]
    x.requires_grad_(True)
    expected = peer_in_loops(made, x)
    ask = tokens(7, D, seed=2)
    theirs = torch.autograd.grad((expected * ask).sum(), wanted, allow_unused=True, materialize_grads=True)
    found = made(x)
    ours = torch.autograd.grad((found * ask).sum(), wanted, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert any(g.abs().sum() > 0 for g in theirs[1:])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"gated": True, "query_norm": "layer"}], ids=["paper", "gated"])
def test_3_gradcheck(options: dict[str, object]) -> None:
    made, x = layer(**options), tokens(3, D).requires_grad_(True)
    if "query_norm" not in options:
        made.router.norm.frozen = True
    assert torch.autograd.gradcheck(made, (x,), fast_mode=True)


def test_4_random_queries_reach_far_more_than_k_squared_experts() -> None:
    made = layer(grid=(16, 16), heads=1, top_k=2, query_norm="none", share_keys=False, dim_key=8)
    ids = made.router(tokens(1, 4000, D), Condition()).indices
    assert ids is not None
    assert int(ids.min()) >= 0 and int(ids.max()) < 256
    few = ids[:, :40].unique().numel()
    assert few > 4
    assert ids.unique().numel() > max(100, few)


def test_5_one_expert_per_head_with_gate_one_is_an_mlp_of_h_neurons() -> None:
    made, x = layer(heads=5, top_k=1, gate="one").eval(), tokens(4, D)
    ids = made.router(x[None], Condition()).indices
    assert ids is not None
    rows = made.experts.table.rows[ids[0]]
    expected = torch.stack([torch.nn.functional.gelu(r[:, 0] @ t) @ r[:, 1] for r, t in zip(rows, x, strict=True)])
    torch.testing.assert_close(made(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_5_all_experts_with_gate_one_are_the_dense_layer(gated: bool) -> None:
    made, x = layer(heads=1, top_k=20, gate="one", gated=gated).eval(), tokens(4, D)
    into, *gating, out = made.experts.table.rows.unbind(1)
    hidden = torch.nn.functional.gelu(x @ (gating[0] if gated else into).T) * (x @ into.T if gated else 1)
    torch.testing.assert_close(made(x), hidden @ out, rtol=0, atol=1e-12)


def test_6_permuted_heads_change_nothing() -> None:
    made, x = layer(heads=3, share_keys=False).eval(), tokens(5, D)
    other, order = copy.deepcopy(made), [2, 0, 1]
    with torch.no_grad():
        router = other.router
        weight = router.queries.weight.unflatten(0, (3, -1))
        router.queries.weight.copy_(weight[order].flatten(0, 1))
        for tensor in (router.keys_first, router.keys_second, router.norm.weight, router.norm.bias):
            tensor.copy_(tensor[order].clone())
    torch.testing.assert_close(other(x), made(x), rtol=0, atol=1e-13)


def test_6_permuted_sub_keys_with_their_rows_change_nothing() -> None:
    made, x = layer().eval(), tokens(5, D)
    other, first, second = copy.deepcopy(made), [3, 1, 0, 2], [4, 2, 0, 1, 3]
    with torch.no_grad():
        other.router.keys_first.copy_(made.router.keys_first[:, first])
        other.router.keys_second.copy_(made.router.keys_second[:, second])
        ids = torch.arange(20).view(4, 5)[first][:, second].flatten()
        other.experts.table.rows.copy_(made.experts.table.rows[ids])
    torch.testing.assert_close(other(x), made(x), rtol=0, atol=1e-13)


def test_6_permuted_tokens_permute_outputs() -> None:
    order = [3, 0, 4, 1, 2]
    for training in (True, False):
        made, x = layer().train(training), tokens(5, D)
        torch.testing.assert_close(made(x[order]), made(x)[order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("gradient", ["dense", "compact"])
def test_7_rows_that_nobody_retrieved_have_no_gradient_and_stay(gradient: str) -> None:
    made, x = layer(grid=(8, 8)), tokens(3, D)
    made.experts.table.gradient = gradient  # type: ignore[union-attr]
    ids = made.router.eval()(x[None], Condition()).indices
    assert ids is not None
    before = made.experts.table.rows.detach().clone()
    made(x).square().sum().backward()
    grad = made.experts.table.rows.grad
    assert grad is not None
    touched = set(ids.unique().tolist())
    if grad.is_sparse:
        assert set(grad.coalesce().indices()[0].tolist()) == touched
    dense = grad.to_dense() if grad.is_sparse else grad
    moved = dense.flatten(1).abs().sum(1) > 0
    assert set(moved.nonzero().flatten().tolist()) <= touched
    torch.optim.SGD([made.experts.table.rows], lr=0.1).step()
    rest = torch.ones(64, dtype=torch.bool)
    rest[list(touched)] = False
    assert rest.any()
    assert torch.equal(made.experts.table.rows[rest], before[rest])
    assert not torch.equal(made.experts.table.rows, before)


def test_8_a_row_that_several_heads_retrieve_has_the_sum_of_their_gradients() -> None:
    made, x = layer(heads=2, share_keys=True).eval(), tokens(1, D)
    with torch.no_grad():
        weight = made.router.queries.weight.unflatten(0, (2, -1))
        weight[1] = weight[0]
    one = layer(heads=1).eval()
    with torch.no_grad():
        one.router.queries.weight.copy_(made.router.queries.weight[:4])
        one.router.keys_first.copy_(made.router.keys_first)
        one.router.keys_second.copy_(made.router.keys_second)
        for name in ("weight", "bias"):
            getattr(made.router.norm, name).copy_(getattr(made.router.norm, name)[:1].expand(2, -1))
            getattr(one.router.norm, name).copy_(getattr(made.router.norm, name)[:1])
        one.experts.table.rows.copy_(made.experts.table.rows)
    ask = tokens(1, D, seed=4)
    for each in (made, one):
        (each(x) * ask).sum().backward()
    torch.testing.assert_close(made.experts.table.rows.grad, 2 * one.experts.table.rows.grad, rtol=0, atol=1e-12)


def test_8_counts_conserve() -> None:
    made, x = layer().eval(), tokens(2, 9, D)
    ids = made.router(x, Condition()).indices
    assert ids is not None
    counts = torch.bincount(ids.flatten(), minlength=20)
    assert int(counts.sum()) == 2 * 9 * 2 * 3
    assert int(counts.view(4, 5).sum(1).sum()) == int(counts.sum())


def test_9_gates_of_a_head_sum_to_one_and_ignore_a_constant() -> None:
    made, x = layer(query_bias=True, query_norm="none", share_keys=False).eval(), tokens(1, 5, D)
    found = made.router.retrieve(x, Condition())
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(1, 5, 2, dtype=torch.float64))
    with torch.no_grad():  # a constant on all sub-keys of one axis, through a coordinate that only they share
        for half in (made.router.keys_first, made.router.keys_second):
            half[..., 0] = 1.0
        base = made.router.retrieve(x, Condition())
        made.router.queries.bias[0] += 7.0
    again = made.router.retrieve(x, Condition())
    assert torch.equal(again.indices, base.indices)
    torch.testing.assert_close(again.scores[..., 0, :], base.scores[..., 0, :] + 7.0)
    torch.testing.assert_close(again.gates, base.gates, rtol=0, atol=1e-12)


def test_10_pieces_and_batches_do_not_matter_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer().eval(), tokens(40, D)
    whole = made(x)
    for size in (1, 7, 39):
        torch.testing.assert_close(torch.cat([made(part) for part in x.split(size)]), whole, rtol=0, atol=1e-13)
    with torch.no_grad():
        monkeypatch.setattr("mixwright.methods.peer.layer.QUERY_BYTES", 1)
        monkeypatch.setattr("mixwright.ops.route.BUFFER", 25)
        assert made._piece(x) == 16
        torch.testing.assert_close(made(x), whole, rtol=0, atol=1e-13)
        torch.testing.assert_close(made(x.view(4, 10, D)), whole.view(4, 10, D), rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["past_batch", "layer", "rms", "l2", "none"])
def test_10_every_norm_but_batch_is_causal_in_training(norm: str) -> None:
    made, x = layer(query_norm=norm), tokens(1, 6, D)
    for seed in range(3):
        made(tokens(1, 6, D, seed=10 + seed))  # some statistics of the past
    other = x.clone()
    other[:, 4] += 3.0
    held = copy.deepcopy(made)
    before, after = made(x), held(other)
    assert torch.equal(after[:, :4], before[:, :4])
    assert torch.equal(after[:, 5], before[:, 5])
    assert not torch.equal(after[:, 4], before[:, 4])


def test_10_batch_norm_leaks_in_training_and_not_in_eval_mode() -> None:
    made, x = layer(), tokens(1, 6, D)
    other = x.clone()
    other[:, 4] += 3.0
    assert not torch.equal(copy.deepcopy(made)(other)[:, :4], copy.deepcopy(made)(x)[:, :4])
    made.eval()
    assert torch.equal(made(other)[:, :4], made(x)[:, :4])
    steps = torch.cat([made(x[:, [t]]) for t in range(6)], 1)
    torch.testing.assert_close(steps, made(x), rtol=0, atol=1e-13)


def test_11_two_runs_are_equal_to_the_bit() -> None:
    runs = []
    for _ in range(2):
        made, x = layer().float(), tokens(20, D).float().requires_grad_(True)
        made(x).square().sum().backward()
        runs.append([x.grad, *(p.grad for p in made.parameters())])
    for one, other in itertools.zip_longest(*runs):
        assert torch.equal(one, other)


class Largest(TorchDispatchMode):
    """The largest tensor that anything returned."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor) and made._base is None and made.layout == torch.strided:
                self.nbytes = max(self.nbytes, made.nbytes)
        return out


def test_13_memory_of_a_pass_without_gradients_grows_with_its_output_alone() -> None:
    made = PEER(64, (64, 64), heads=8, top_k=16, dim_key=32).eval()
    with torch.no_grad(), Largest() as seen:
        made(torch.randn(20_000, 64))
    # gathered rows would be 20,000 * 128 * 2 * 64 * 4 bytes = 1.3 GB, all scores 82 MB, the output is 5 MB
    assert seen.nbytes <= 20_000 * 64 * 4


@pytest.mark.parametrize("dim", [1, 7, 64, 96])
@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (9, 2), (5, 5)])
def test_15_widths_and_grids(dim: int, grid: tuple[int, int]) -> None:
    for k in {1, grid[0] * grid[1]}:
        made = layer(dim=dim, grid=grid, top_k=k).eval()
        x = tokens(3, dim)
        torch.testing.assert_close(made(x), peer_in_loops(made, x), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="top_k"):
        layer(dim=dim, grid=grid, top_k=grid[0] * grid[1] + 1)


def test_15_masked_tokens_contribute_nothing() -> None:
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    x = tokens(2, 5, D)
    spoiled = x.clone()
    spoiled[~mask] = torch.nan
    grads = []
    for given in (x, spoiled):
        made, given = layer(), given.clone().requires_grad_(True)
        out = made(given, mask)
        assert out[~mask].eq(0).all()
        out.square().sum().backward()
        assert given.grad is not None and given.grad[~mask].eq(0).all()
        grads.append([out, given.grad[mask], made.router.norm.mean, *(p.grad for p in made.parameters())])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    made = layer()
    alone = made(x[mask])
    torch.testing.assert_close(layer()(x, mask)[mask], alone, rtol=0, atol=1e-12)


def test_19_sums_are_far_faster_than_gathered_rows(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel", lambda: compiled)
    torch.manual_seed(0)
    rows, x = torch.randn(128**2, 2, 64), torch.randn(256, 64)
    indices, weights = torch.randint(0, 128**2, (256, 128)), torch.rand(256, 128)
    spent = {combine_neurons: [], neurons_reference: []}
    for _ in range(7):
        for way, times in spent.items():
            start = time.process_time()
            way(x, rows, weights, indices, "gelu")
            times.append(time.process_time() - start)
    ratios = sorted(b / a for a, b in zip(*spent.values(), strict=True))
    assert ratios[3] > 2, ratios


def test_the_router_agrees_with_brute_force_over_all_experts() -> None:
    made, x = layer(grid=(7, 6), top_k=8), tokens(1, 30, D)
    made.eval()
    found = made.router.retrieve(x, Condition())
    first, second = made.router.half_scores(x, Condition())
    expected = product_key_top_k_reference(first, second, 8)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.scores, expected.scores)
