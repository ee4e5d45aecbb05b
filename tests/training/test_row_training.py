"""The training loop over tables that are learned by rows: against the dense loop, cut off, and over two processes."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.memory import estimate_bytes
from mixwright.training.optimizers import make_optimizers, set_rate
from mixwright.training.stage import select_parameters

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("table_model", HERE / "table_model.py")
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
table_model, table_stage, loss = _module.table_model, _module.table_stage, _module.loss

Make = Callable[..., Any]
ROWS = ["lazy_adamw", "rowwise_adagrad"]


class Cut(Exception):
    """The power goes."""


def trained(
    batches: Make, optimizer: str, folder: Path | None = None, *, cut: int | None = None, **options: Any
) -> nn.Module:
    model = table_model(options.pop("dtype", torch.float64), options.pop("query_norm", "batch"))
    passes: list[int] = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        if model.training:
            passes.append(1)
            if cut is not None and len(passes) > cut:
                raise Cut
        return loss(model, batch)

    stage = replace(table_stage(optimizer, choose_every=3), objective=objective)
    settings = TrainConfig(batch_size=2, accumulate=2, checkpoint_every=2)
    fit(
        *(model, stage, batches("causal", batch_size=2)),
        config=settings,
        folder=folder,
        validation=batches("causal", batch_size=2),
        **options,
    )
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_by_rows_is_by_whole_tables(batches: Make) -> None:
    whole, rows = trained(batches, "adamw"), trained(batches, "lazy_adamw")
    for (name, a), b in zip(whole.state_dict().items(), rows.state_dict().values(), strict=True):
        assert (a - b).abs().max() <= 1e-10, name
    assert not same(whole, table_model())


def test_gradients_stay_compact_through_the_loop(batches: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixwright.training import row_optimizer

    kinds: list[bool] = []
    plain = row_optimizer.AbstractRowOptimizer._step_rows

    def watched(self: Any, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        kinds.append(parameter.grad.is_sparse)
        plain(self, parameter, group)

    monkeypatch.setattr(row_optimizer.AbstractRowOptimizer, "_step_rows", watched)
    trained(batches, "lazy_adamw")
    assert kinds == [True] * 8


@pytest.mark.parametrize("optimizer", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cut", [5, 14])
def test_cut_off_and_resumed_ends_in_the_same_bits(
    optimizer: str, dtype: torch.dtype, cut: int, batches: Make, tmp_path: Path
) -> None:
    whole = trained(batches, optimizer, tmp_path / "whole", dtype=dtype)
    with pytest.raises(Cut):
        trained(batches, optimizer, tmp_path / "cut", cut=cut, dtype=dtype)
    again = trained(batches, optimizer, tmp_path / "cut", resume=True, dtype=dtype)
    assert same(whole, again)
    finished = trained(batches, optimizer, tmp_path / "cut", resume=True, dtype=dtype)
    assert same(whole, finished)


def test_the_model_is_given_back_as_it_was(batches: Make) -> None:
    model = trained(batches, "lazy_adamw")
    table, norm = model.layer.experts.table, model.layer.router.norm
    assert table.gradient == "dense" and table.before_read == [] and norm.accumulate == 1
    cut = table_model()
    held = cut.layer.experts.table
    with pytest.raises(ValueError, match="the train loss is nan"):
        fit(cut, replace(table_stage("lazy_adamw"), objective=lambda m, b: loss(m, b) * torch.nan), batches("causal"))
    assert held.gradient == "dense" and held.before_read == []


def test_query_norm_pools_over_the_passes_of_a_step(batches: Make) -> None:
    seen: list[int] = []

    def objective(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model.layer.router.norm.accumulate)
        return loss(model, batch)

    model = table_model()
    stage = replace(table_stage("lazy_adamw", steps=1), objective=objective)
    fit(model, stage, batches("causal"), config=TrainConfig(accumulate=3))
    assert seen == [3, 3, 3] and model.layer.router.norm.steps == 1


def test_frozen_rows_are_kept_by_rows_and_refused_otherwise(batches: Make) -> None:
    for optimizer in ("lazy_adamw", "rowwise_adagrad", "adamw"):
        model = table_model()
        table = model.layer.experts.table
        table.frozen = torch.arange(480) % 2 == 0
        before = table.rows.detach().clone()
        if optimizer == "adamw":
            with pytest.raises(ValueError, match="rows has frozen rows, which adamw would move"):
                fit(model, table_stage(optimizer), batches("causal"))
            continue
        fit(model, table_stage(optimizer), batches("causal"))
        moved = (table.rows != before).flatten(1).any(1)
        assert not moved[::2].any() and moved[1::2].any()


def test_rates_of_tables_fall_to_their_share() -> None:
    model = table_model()
    stage = table_stage("lazy_adamw")
    optimizers = make_optimizers(model, stage, select_parameters(model, stage.groups))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["AdamW", "LazyAdamW"]
    rates = []
    for progress in (0.0, 0.5, 1.0):
        set_rate(optimizers, 1.0, progress)
        rates.append([group["lr"] for optimizer in optimizers for group in optimizer.param_groups])
    assert rates == [[0.02, pytest.approx(lr)] for lr in (0.08, 0.05, 0.02)]
    optimizers[1].close()


def test_memory_is_counted_by_what_the_optimiser_keeps(batches: Make) -> None:
    needs = {}
    for optimizer in ("adamw", *ROWS):
        estimate = estimate_bytes(table_model(query_norm="none"), table_stage(optimizer), batches("causal"))
        needs[optimizer] = estimate["gradients and optimiser"]
    numbers = 480 * 2 * 6
    assert needs["adamw"] - needs["lazy_adamw"] == 4 * numbers - 4 * 480
    assert needs["adamw"] - needs["rowwise_adagrad"] == 12 * numbers - 4 * 480 * 2 - 4 * 480


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ROWS)
def test_two_processes_are_one(optimizer: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = str(HERE / "two_processes_table.py")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for start in ([script, str(tmp_path / "one"), "2"], [*launch, script, str(tmp_path / "two"), "1"]):
        command = [sys.executable, *start, optimizer]
        done = run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two, other = (load_file(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert one.keys() == two.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-9, name
        assert torch.equal(two[name], other[name]), name
