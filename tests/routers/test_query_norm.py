"""Query batch norm that behaves: padding, accumulation, processes, checkpoints, evaluation; its causal relatives."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixwright.routers.query_norm import (
    AbstractStandardised,
    BatchQueryNorm,
    PastBatchQueryNorm,
    known,
    make_key_norm,
    make_query_norm,
)
from mixwright.routing import Condition

from .two_processes import SHARES, made, step

H, DIM = 2, 4
STANDARDISED = [BatchQueryNorm, PastBatchQueryNorm]
both = pytest.mark.parametrize("kind", STANDARDISED, ids=lambda kind: kind.__name__)


def queries(tokens: int, seed: int = 0) -> Tensor:
    return 2 + 3 * torch.randn(tokens, H, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(norm: AbstractStandardised) -> tuple[Tensor, Tensor, Tensor]:
    return norm.mean.clone(), norm.var.clone(), norm.steps.clone()


def close(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_batch_norm_is_torchs() -> None:
    ours, theirs = BatchQueryNorm(H, DIM).double(), nn.BatchNorm1d(H * DIM).double()
    for seed in range(3):
        x = queries(9, seed)
        torch.testing.assert_close(ours(x, None).flatten(1), theirs(x.flatten(1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.var.flatten(), theirs.running_var, rtol=0, atol=1e-12)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x, None).flatten(1), theirs(x.flatten(1)), rtol=0, atol=1e-12)
    assert int(ours.steps) == int(theirs.num_batches_tracked or 0)


@both
def test_padding_has_no_part_in_anything(kind: type[AbstractStandardised]) -> None:
    x, counted = queries(9), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1]).bool()
    x[~counted] = 1e6
    padded, bare = kind(H, DIM).double(), kind(H, DIM).double()
    asked = x.clone().requires_grad_(True)
    out = padded(asked, counted)[counted]
    torch.testing.assert_close(out, bare(x[counted], None), rtol=0, atol=1e-9)
    close(state(padded), state(bare))
    out.square().sum().backward()
    assert asked.grad is not None and asked.grad[~counted].eq(0).all()
    none = kind(H, DIM).double()
    before = state(none)
    assert none(x, torch.zeros(9).bool()).isfinite().all()
    close(state(none), before)


@both
@pytest.mark.parametrize("cuts", [(3, 3, 3), (1, 7, 1), (9,), (0, 4, 5)], ids=str)
def test_statistics_after_an_accumulated_step_are_those_of_one_large_batch(
    kind: type[AbstractStandardised], cuts: tuple[int, ...]
) -> None:
    whole, parts = kind(H, DIM).double(), kind(H, DIM).double()
    parts.accumulate = len(cuts)
    for seed in range(2):
        x = queries(9, seed)
        whole(x, None)
        for number, part in enumerate(x.split(cuts)):
            before = state(parts)
            parts(part, None)
            if number < len(cuts) - 1:
                close(state(parts), before)
        close(state(parts), state(whole))


@both
def test_a_checkpointed_layer_counts_once_and_its_second_forward_is_its_first(
    kind: type[AbstractStandardised],
) -> None:
    x, ask = queries(9), queries(9, 5)
    grads: list[Tensor] = []
    states: list[tuple[Tensor, ...]] = []
    for again in (False, True):
        norm, given = kind(H, DIM).double(), x.clone().requires_grad_(True)
        norm(queries(5, 3), None)
        for _ in range(2):
            out = checkpoint(norm, given, None, use_reentrant=False) if again else norm(given, None)
            (out.exp() * ask).sum().backward()  # type: ignore[union-attr]
        assert given.grad is not None
        grads.append(given.grad)
        states.append(state(norm))
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
    close(*states)


def test_a_single_token_in_training_is_standardised_by_the_past() -> None:
    norm = BatchQueryNorm(H, DIM).double()
    norm(queries(50), None)
    kept = state(norm)
    alone = queries(1, 3)
    out = norm(alone, None)
    close(state(norm), kept)
    torch.testing.assert_close(out, copy.deepcopy(norm).eval()(alone, None))
    assert not torch.equal(out, norm.bias.expand_as(out))
    one_of_two = norm(queries(2, 3), torch.tensor([True, False]))
    assert one_of_two.isfinite().all()


def test_past_batch_uses_earlier_steps_only_averaged_evenly_at_first() -> None:
    norm = PastBatchQueryNorm(H, DIM, momentum=0.01).double()
    x = queries(9)
    torch.testing.assert_close(norm(x, None), x, rtol=1e-4, atol=0)
    more = [queries(9, seed) for seed in (1, 2, 3)]
    for one in more:
        norm(one, None)
    means = torch.stack([t.mean(0) for t in (x, *more)])
    torch.testing.assert_close(norm.mean, means.mean(0), rtol=0, atol=1e-12)
    before = state(norm)
    expected = (x - before[0]) / (before[1] + 1e-5).sqrt()
    torch.testing.assert_close(norm(x, None), expected, rtol=0, atol=1e-12)


@both
def test_frozen_statistics_stay_and_are_used(kind: type[AbstractStandardised]) -> None:
    norm = kind(H, DIM).double()
    norm(queries(9), None)
    norm.frozen, kept = True, state(norm)
    out = norm(queries(5, 2), None)
    close(state(norm), kept)
    assert torch.equal(out, norm.eval()(queries(5, 2), None))


@both
def test_statistics_stay_float32_in_a_narrow_model_and_travel(kind: type[AbstractStandardised]) -> None:
    norm = kind(H, DIM)
    norm(queries(9).float(), None)
    kept = state(norm)
    narrow = copy.deepcopy(norm).to(torch.bfloat16)
    close(state(narrow), kept)
    assert narrow.weight.dtype == torch.bfloat16
    assert narrow.eval()(queries(3).float(), None).dtype == torch.float32
    for other in (pickle.loads(pickle.dumps(norm)), copy.deepcopy(norm)):
        close(state(other), kept)
    fresh = kind(H, DIM)
    fresh.load_state_dict(norm.state_dict())
    close(state(fresh), kept)


@pytest.mark.parametrize("name", ["layer", "rms", "l2"])
def test_norms_of_a_single_query_work_on_its_halves(name: str) -> None:
    norm, x = make_query_norm(name, H, DIM).double(), queries(5)  # type: ignore[arg-type]
    halves = norm(x, None).unflatten(-1, (2, 2))
    torch.testing.assert_close(halves.square().mean(-1), torch.ones(5, H, 2).double(), rtol=0, atol=1e-3)
    larger = norm(x * 7, None)
    torch.testing.assert_close(larger, norm(x, None), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["layer", "rms", "l2"])
def test_key_norms_start_at_length_one(name: str) -> None:
    norm = make_key_norm(name, 8)  # type: ignore[arg-type]
    assert norm is not None
    keys = norm(torch.randn(2, 5, 8) * 9)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(2, 5), rtol=0, atol=1e-3)
    assert make_key_norm("none", 8) is None


def test_unknown_names_are_refused_with_the_nearest() -> None:
    names = ("none", "batch", "past_batch")
    known("query_norm", "batch", names)
    with pytest.raises(ValueError, match="query_norm='batchnorm' is unknown; did you mean 'batch'"):
        known("query_norm", "batchnorm", names)
    for other in ("zzz", 3, None):
        with pytest.raises(ValueError, match="is unknown; accepted are none, batch, past_batch"):
            known("query_norm", other, names)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("two_processes.py"))
    running = [subprocess.Popen([sys.executable, script, str(tmp_path), str(rank)]) for rank in range(2)]
    alone = {norm: step(made(norm), slice(None)) for norm in ("batch", "past_batch")}
    assert [process.wait(120) for process in running] == [0, 0]
    for norm, whole in alone.items():
        for name in SHARES:
            parts = [torch.load(tmp_path / f"{norm}-{name}-{rank}.pt") for rank in range(2)]
            for key, expected in whole.items():
                if key in ("out", "x"):
                    found = torch.cat([part[key] for part in parts], 1)
                elif key in ("mean", "var"):
                    assert torch.equal(parts[0][key], parts[1][key])
                    found = parts[0][key]
                else:
                    found = sum(part[key] for part in parts if key in part)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-11, msg=f"{norm} {name} {key}")


def test_a_mask_reaches_the_statistics_through_the_router() -> None:
    router, bare = made("batch"), made("batch")
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    router(x, Condition(token_mask=mask))
    bare(x[mask][None], Condition())
    close(state(router.norm), state(bare.norm))  # type: ignore[arg-type]
