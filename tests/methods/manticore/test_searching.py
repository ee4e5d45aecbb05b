"""Searches by gradients: who learns when, on which data, at which rate; and what running the hybrid costs."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright.training.update as updating
from mixwright.backbones.tiny import tiny_backbone
from mixwright.methods.manticore.cost import flops_by_slot
from mixwright.methods.manticore.model import HybridModel, compose
from mixwright.methods.manticore.parameters import live_components, live_projectors
from mixwright.methods.manticore.recipe import stages
from mixwright.methods.manticore.search_stage import Search, refuse_overlap
from mixwright.methods.manticore.searching import (
    CostAware,
    asked_for,
    begin_search,
    end_search,
    rows,
    search_groups,
    search_objective,
)
from mixwright.training.fit import fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import Stage, select_parameters

from .pair import config_of, job_in, tiny_pair

MODES = ("darts", "alternating", "bilevel", "gaea", "gumbel", "drnas")


@pytest.fixture(scope="module")
def pair() -> list[Any]:
    return tiny_pair()


def hybrid(pair: list[Any], **config: Any) -> HybridModel:
    return compose(config_of(**{"num_blocks": 2, **config}), pair)


def search_stage(model: HybridModel, **config: Any) -> Stage:
    settings = config_of(**{"num_blocks": 2, **config})
    stage = next(stage for stage in stages(settings) if stage.name == "search")
    assert stage.choose_groups is not None
    return Stage(
        name="search",
        groups=stage.choose_groups(model),
        steps=stage.steps,
        warmup=stage.warmup,
        cooldown=stage.cooldown,
        weight_decay=stage.weight_decay,
        watch=stage.watch,
    )


@pytest.mark.parametrize("mode", MODES)
def test_each_search_has_its_rule(pair: list[Any], mode: Any) -> None:
    model = hybrid(pair)
    config = config_of(num_blocks=2, search=mode, weights_delay=0.2)
    own, weights = search_groups(model, config)
    names = select_parameters(model, (own, weights))
    assert set(names[1]) == {n for n, _ in model.named_parameters() if n.endswith("router.logits")}
    assert set(names[0]) == {n for n, _ in model.named_parameters()} - set(names[1])  # the paper: everything learns
    assert weights.weight_decay == 0.0 and not weights.clip and weights.delay == 0.2
    assert weights.lr == (0.1 if mode == "gaea" else 0.01)
    assert weights.optimizer == ("exponentiated_gradient" if mode == "gaea" else "adamw")
    assert weights.split == ("val" if mode == "bilevel" else "train")
    assert (own.turn, weights.turn) == (((0, 2), (1, 2)) if mode == "alternating" else (None, None))
    begin_search(model, config)
    assert {row.draw for row in rows(model)} == {{"gumbel": "gumbel", "drnas": "dirichlet"}.get(mode, "none")}
    end_search(model)
    assert {row.draw for row in rows(model)} == {"none"}


@pytest.mark.parametrize("mode", MODES)
def test_each_search_moves_weights_and_ends_the_same_twice(pair: list[Any], mode: Any, tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        model = compose(config_of(search=mode), tiny_pair())
        begin_search(model, config_of(search=mode))
        stage = search_stage(model, search=mode, num_blocks=1, search_steps=2)
        job = job_in(tmp_path)
        assert job.data is not None
        fit(model, stage, job.data, config=job.recipe.train, seed=0, validation=job.validation)
        end_search(model)
        found.append(model.mixture_weights)
        assert float(found[-1].sum()) == pytest.approx(1, abs=1e-6) and (found[-1] > 0).all()
    assert torch.equal(*found) and not torch.equal(found[0], torch.full((1, 2), 0.5))


def test_weights_that_learn_on_held_out_data_see_nothing_else(pair: list[Any], tmp_path: Path) -> None:
    model, job = compose(config_of(search="bilevel"), tiny_pair()), job_in(tmp_path)
    seen: set[tuple[bool, bool]] = set()
    assert job.data is not None and job.validation is not None
    held = _token_rows(job.validation.take(slice(0, len(job.validation))))

    def noted(model: Any, batch: Any) -> torch.Tensor:
        learning = {n.endswith("router.logits") for n, p in model.named_parameters() if p.requires_grad}
        from_held_out = {row in held for row in _token_rows(batch)}
        assert len(learning) == len(from_held_out) == 1
        seen.add((learning.pop(), from_held_out.pop()))
        return supervised(model, batch)

    stage = search_stage(model, search="bilevel", num_blocks=1)
    bilevel = Stage(**{**{f: getattr(stage, f) for f in stage.__dataclass_fields__}, "objective": noted})
    fit(model, bilevel, job.data, config=job.recipe.train, validation=job.validation)
    assert seen == {(True, True), (False, False)}
    refuse_overlap(job)


def _token_rows(batch: Any) -> set[tuple[int, ...]]:
    rows = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True)
    return {tuple(row[mask].tolist()) for row, mask in rows}


def test_bilevel_refuses_data_that_is_missing_or_shared(pair: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bilevel: mixture weights learn on data of their own; give data\.validation"):
        refuse_overlap(job_in(tmp_path, held_out=False))
    job = job_in(tmp_path)
    job.validation.examples = [*job.validation.examples[:3], job.data.examples[5]]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"1 of 4 examples of data\.validation are in data\.train too, .* number 3"):
        refuse_overlap(job)
    search = Search(config_of(search="bilevel"))
    with pytest.raises(ValueError, match="1 of 4"):
        search._prepare(hybrid(pair), job, True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_ends_with_the_optimiser_steps(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the passes, nor with the examples over some batch size."""
    rates: list[float] = []
    plain = updating.set_rate
    monkeypatch.setattr(
        updating, "set_rate", lambda o, rate, progress=0.0: (rates.append(rate), plain(o, rate, progress))
    )
    model, job = compose(config_of(), tiny_pair()), job_in(tmp_path, rows=5, batch_size=2, accumulate=accumulate)
    assert job.data is not None
    fit(model, search_stage(model, num_blocks=1, search_steps=4), job.data, config=job.recipe.train)
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_only_what_acts_learns(pair: list[Any]) -> None:
    model = hybrid(pair)
    model.mixture_weights = [[1.0, 0.0], [0.0, 1.0]]
    chosen = select_parameters(model, search_groups(model, config_of(search="grid")))[0]
    for p in model.parameters():
        p.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached <= set(chosen) and set(chosen) - reached <= {n for n in chosen if "bias" in n or "norm" in n}
    assert live_projectors(model) == () and any(".0.gpt_neox.layers.0." in glob for glob in live_components(model))
    assert not any(".0.gpt_neox.layers.1." in glob for glob in live_components(model))


def test_frozen_components_leave_projectors_alone_to_learn(pair: list[Any]) -> None:
    model = hybrid(pair)
    own = search_groups(model, config_of(train_components=False))[0]
    assert all(".experts." in name for name in select_parameters(model, (own,))[0])
    model.mixture_weights = [[1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match="nothing is left to train"):
        search_groups(model, config_of(train_components=False))


def test_cost_is_the_share_of_operations_that_the_weights_ask_for(pair: list[Any], tmp_path: Path) -> None:
    model, config = hybrid(pair), config_of(num_blocks=2, cost=0.5)
    flops = flops_by_slot(model, 16).blocks()
    aware: Any = search_objective(config, model, 16)
    assert torch.equal(aware.flops, flops) and search_objective(config_of(num_blocks=2), model) is supervised
    sums = flops.sum(0)
    for weights in ([[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2, [[0.25, 0.75]] * 2):
        model.mixture_weights = weights
        share = float((sums * torch.tensor(weights[0])).sum() / sums.sum())
        assert float(asked_for(model, flops).detach()) == pytest.approx(share, rel=1e-5)
    model.mixture_weights = [[0.5, 0.5]] * 2
    model.row("blocks.0").logits.requires_grad_(True)
    asked_for(model, flops).backward()
    gradient = model.row("blocks.0").logits.grad
    assert gradient is not None and gradient.argmax() == flops[0].argmax()  # descent leaves the dearer one
    batch = job_in(tmp_path).data.batch(0)  # type: ignore[union-attr]
    model.train()
    with torch.no_grad():
        surplus = aware(model, batch) - supervised(model, batch)
        assert float(surplus) == pytest.approx(0.5 * batch.weight * float(asked_for(model, flops)), rel=1e-3)
    model.eval()
    assert torch.equal(aware(model, batch), supervised(model, batch))


def test_operations_count_and_not_parameters() -> None:
    """What lies in a layer and computes nothing costs nothing; attention costs more the longer the text."""
    alike: list[Any] = [tiny_backbone("gpt_neox", max_position_embeddings=64) for _ in range(2)]
    alike[0].gpt_neox.layers[0].spare = torch.nn.Linear(64, 64)
    model, config = compose(config_of(cost=1.0), alike), config_of(cost=1.0)
    longest, short = (search_objective(config, model, tokens) for tokens in (4096, 16))
    assert isinstance(longest, CostAware) and isinstance(short, CostAware)
    assert longest.flops[0, 0] == longest.flops[0, 1]
    assert torch.equal(longest.flops, flops_by_slot(model, 64).blocks())  # no component reads more
    assert (short.flops < longest.flops).all()


def test_a_falling_temperature_drives_weights_apart(tmp_path: Path) -> None:
    """The same search with it ends nearer to one component per block, and stays at the temperature it ended with."""
    found: dict[float, torch.Tensor] = {}
    for end in (1.0, 0.05):
        config = config_of(search="gaea", temperature_end=end)
        model = compose(config, tiny_pair())
        begin_search(model, config)
        stage = search_stage(model, search="gaea", num_blocks=1, search_steps=6, temperature_end=end)
        job = job_in(tmp_path)
        assert job.data is not None
        fit(model, stage, job.data, config=job.recipe.train, seed=0)
        end_search(model)
        found[end] = torch.stack([row.weights().detach() for row in rows(model)])
        assert all(float(row.temperature) == pytest.approx(end) for row in rows(model))
        assert {row.anneal for row in rows(model)} == {None}
    assert (found[0.05].amax(-1) > found[1.0].amax(-1)).all()
