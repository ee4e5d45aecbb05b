"""PEER as a module: presets, errors, types of numbers, odd inputs, copies, compilation, first values."""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mixwright as mw
from mixwright.experts.table import NeuronTable
from mixwright.methods.peer.layer import PEER
from mixwright.routing import Condition

D = 8


def layer(**options: Any) -> PEER:
    torch.manual_seed(0)
    return PEER(D, options.pop("num_experts", (5, 4)), **{"heads": 2, "top_k": 3, "dim_key": 4, **options})


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, D, generator=torch.Generator().manual_seed(3))


def test_it_is_public() -> None:
    assert mw.PEER is PEER


def test_presets_are_what_their_sources_say() -> None:
    paper = PEER.preset("paper", 16, (32, 32))
    router, table = paper.router, paper.experts.table
    assert (router.heads, router.top_k, router.gate, router.grid) == (8, 16, "softmax", (32, 32))
    assert type(router.norm).__name__ == "BatchQueryNorm" and len(router.keys_first) == 1
    assert (table.parts, paper.experts.activation) == (2, "gelu")
    theirs = PEER.preset("peer_pytorch", 16, 1024)
    router, table = theirs.router, theirs.experts.table
    assert (router.heads, router.top_k, router.gate, router.dim_key) == (8, 1, "relu", 16)
    assert type(router.norm).__name__ == "NoQueryNorm" and len(router.keys_first) == 8
    assert isinstance(table, NeuronTable)
    assert float(table.rows.detach().std()) == pytest.approx(1.0, abs=0.05)
    assert float(router.keys_first.detach().std()) == pytest.approx(0.02, rel=0.1)
    plus = PEER.preset("memory_plus", 16, (32, 32))
    router, table = plus.router, plus.experts.table
    assert (router.heads, router.top_k, router.dim_key, table.parts) == (4, 32, 512, 1)
    assert router.queries.bias is not None and len(router.keys_first) == 4
    assert plus.experts.output_gate is not None
    assert isinstance(table, NeuronTable)
    assert float(table.rows.detach().std()) == pytest.approx(0.25, rel=0.05)
    assert float(router.keys_first.detach().abs().max()) <= 512**-0.5
    assert PEER.preset("paper", 16, (8, 8), heads=3).router.heads == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 24}, "num_experts=24 is no square; give a grid .n1, n2., or 16 or 25"),
        ({"num_experts": 0}, "no square"),
        ({"num_experts": (0, 4)}, "each at least 1"),
        ({"num_experts": (4, 4, 4)}, "two numbers of sub-keys"),
        ({"top_k": 21}, "top_k=21, but a grid of 5 x 4 has 20"),
        ({"top_k": 0}, "top_k=0"),
        ({"heads": 0}, "heads=0"),
        ({"dim_key": 5}, "dim_key=5: a query is two halves"),
        ({"dim_key": 0}, "dim_key=0"),
        ({"gate": "sofmax"}, "gate='sofmax' is unknown; did you mean 'softmax'"),
        ({"query_norm": "layernorm"}, "did you mean 'layer'"),
        ({"key_norm": "batch"}, "key_norm='batch' is unknown"),
        ({"activation": "geluu"}, "did you mean 'gelu'"),
        ({"gated": True, "values_only": True}, "exclude each other"),
        ({"row_dim": 0}, "row_dim=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"half_top_k": 1}, "half_top_k=1 leaves fewer than top_k=3"),
        (
            {"table": NeuronTable(torch.zeros(20, 2, 7))},
            "20 experts of 2 rows of 7 numbers; this layer needs 20 of 2 of 8",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_inputs_that_do_not_fit_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 6, 7\); its last axis must be dim=8"):
        layer()(x[..., :7])
    with pytest.raises(ValueError, match=r"token_mask has shape \(6,\); expected \(2, 6\)"):
        layer()(x, torch.ones(6).bool())
    with pytest.raises(ValueError, match="preset='papre' is unknown; did you mean 'paper'"):
        PEER.preset("papre", 8)


@pytest.mark.parametrize("training", [True, False])
def test_any_number_of_axes_and_layouts(x: Tensor, training: bool) -> None:
    made = layer(query_norm="layer").train(training)
    whole = made(x)
    assert whole.shape == x.shape
    torch.testing.assert_close(made(x.view(12, D)), whole.view(12, D))
    torch.testing.assert_close(made(x.view(1, 2, 3, 2, D)), whole.view(1, 2, 3, 2, D))
    torch.testing.assert_close(made(x[0, 0]), whole[0, 0])
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(made(strided), whole)
    torch.testing.assert_close(made(x.repeat_interleave(2, -1)[..., ::2]), whole)
    mask = torch.ones(2, 6)
    torch.testing.assert_close(made(x, mask.long()), whole)
    for empty in (x[:0], x[:, :0], torch.empty(0, D)):
        assert made(empty).shape == empty.shape
        with torch.no_grad():
            assert made(empty).shape == empty.shape


def test_no_token_leaves_the_statistics() -> None:
    made = layer()
    made(torch.randn(9, D))
    before = made.router.norm.mean.clone()
    none = torch.empty(0, D, requires_grad=True)
    made(none).sum().backward()
    assert none.grad is not None
    assert torch.equal(made.router.norm.mean, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types_of_numbers(x: Tensor, dtype: torch.dtype) -> None:
    for options in ({}, {"row_dim": 4, "gated": True}, {"values_only": True, "output_gate": True}):
        made = layer(query_norm="layer", **options)
        expected = made(x)
        cast = copy.deepcopy(made).to(dtype)
        out = cast(x.to(dtype))
        assert out.dtype == dtype
        out.float().square().sum().backward()
        assert cast.router.bias_first.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype == torch.float64:
            torch.testing.assert_close(out, expected.double(), rtol=1e-4, atol=1e-5)
        # a narrow backbone around a layer of float32
        beside = made(x.to(dtype))
        assert beside.dtype == dtype
        torch.testing.assert_close(beside.float(), expected, rtol=0.05, atol=0.05)


def test_routing_is_the_same_under_autocast(x: Tensor) -> None:
    made = layer().eval()
    condition = Condition()
    expected = made.router(x, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made.router(x, condition)
        out = made(x)
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.indices, expected.indices)  # type: ignore[arg-type]
    torch.testing.assert_close(out.float(), made(x), rtol=0.02, atol=0.02)
    made.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made(x.requires_grad_()).float().sum().backward()
    assert made.router.keys_first.grad is not None


def test_copies_and_states(x: Tensor) -> None:
    made = layer()
    made(x)
    made.eval()
    expected = made(x)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    fresh = layer()
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), fresh.eval()):
        assert torch.equal(other(x), expected)
    with pytest.raises(RuntimeError, match="size mismatch for router.keys_first"):
        layer(num_experts=(6, 4)).load_state_dict(made.state_dict())


def test_a_shared_table_learns_from_both_layers(x: Tensor) -> None:
    first = layer()
    second = layer(table=first.experts.table, heads=1)
    stack = nn.Sequential(first, second)
    assert sum(name.endswith("rows") for name, _ in stack.named_parameters()) == 1
    first(x).sum().backward()
    once = first.experts.table.rows.grad.clone()  # type: ignore[union-attr]
    second(x).sum().backward()
    assert not torch.equal(first.experts.table.rows.grad, once)  # type: ignore[union-attr]


def test_compiled_or_not_is_the_same() -> None:
    # apart, without the run-time checks of shapes, which stop on the compiler's stand-ins for tensors
    script = """
import copy, torch
from mixwright.methods.peer.layer import PEER
x = torch.randn(2, 6, 8)
for training in (False, True):
    made = PEER(8, (5, 4), heads=2, top_k=3, dim_key=4).train(training)
    expected = copy.deepcopy(made)(x)
    compiled = torch.compile(made, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    with torch.no_grad():
        assert compiled(x[:1]).shape == (1, 6, 8)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)


def test_checkpointed_or_not_is_the_same(x: Tensor) -> None:
    for norm in ("batch", "past_batch"):
        grads: list[Tensor] = []
        for again in (False, True):
            made, given = layer(query_norm=norm, dropout=0.2), x.clone().requires_grad_()
            torch.manual_seed(5)
            made(x)
            out = checkpoint(made, given, use_reentrant=False) if again else made(given)
            out.square().sum().backward()  # type: ignore[union-attr]
            grads.append(torch.cat([given.grad.flatten(), made.router.norm.mean.flatten()]))  # type: ignore[union-attr]
        torch.testing.assert_close(*grads)


def test_dropout_acts_in_training_only(x: Tensor) -> None:
    made = layer(dropout=0.5, query_norm="none")
    bare = layer(query_norm="none")
    torch.testing.assert_close(made.eval()(x), bare(x))
    made.train()
    torch.manual_seed(0)
    mean = torch.stack([made(x) for _ in range(300)]).mean(0)
    assert not torch.equal(made(x), made(x))
    torch.testing.assert_close(mean, bare(x), rtol=0, atol=0.25)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "relu", "renormalised", "one"])
def test_fresh_outputs_have_a_sane_size(gate: str) -> None:
    given = torch.randn(400, 64)
    for options in ({}, {"gated": True, "activation": "silu"}, {"values_only": True}, {"row_dim": 16}):
        torch.manual_seed(1)
        made = PEER(64, (32, 32), gate=gate, dim_key=32, **options)  # type: ignore[arg-type]
        assert 0.2 < float(made(given).detach().square().mean().sqrt()) < 1.2
    made.eval()
    made.calibrate(given, 0.1)
    assert float(made(given).detach().square().mean().sqrt()) == pytest.approx(0.1, rel=1e-3)


def test_calibrate_refuses_a_silent_layer(x: Tensor) -> None:
    made = layer()
    with torch.no_grad():
        made.experts.table.rows[:, -1] = 0  # type: ignore[index]
    with pytest.raises(ValueError, match="outputs are zero"):
        made.calibrate(x)


def test_whole_numbers_are_no_hidden_states() -> None:
    with pytest.raises(TypeError, match="x has dtype torch.int64; expected floating point"):
        PEER(8, 16, heads=1, top_k=2, dim_key=4)(torch.ones(2, 8, dtype=torch.long))
