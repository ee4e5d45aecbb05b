"""Aligning from kept activations: components run once per example, the same projectors in the end, or a refusal."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.methods.manticore.aligning import align_groups, align_objective, why_not_cached
from mixwright.methods.manticore.cached_align import CachedAlign, Store
from mixwright.methods.manticore.model import HybridModel, compose
from mixwright.training.fit import fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import Stage

from .pair import config_of, job_in, tiny_pair

OUTPUT: dict[str, Any] = {"align": "output", "align_steps": 12, "align_learning_rate": 1e-2}


@contextmanager
def counted(model: HybridModel) -> Generator[list[int]]:
    """How often the first layer of each component ran."""
    runs = [0] * len(model.components)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            runs[number] += 1

        return hook

    parts = zip(model.backbone.parts, model.components, strict=True)
    hooks = [p.layer(c, 0).register_forward_hook(count(m)) for m, (p, c) in enumerate(parts)]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


def aligned(folder: Path, **config: Any) -> tuple[HybridModel, list[int], Any]:
    """Stage align's own objective, fitted; the model, how often components ran, and the objective."""
    settings = config_of(**{**OUTPUT, **config})
    model, job = compose(settings, tiny_pair()), job_in(folder)
    objective = align_objective(model, job, settings, quiet=True)
    stage = Stage(
        name="align",
        groups=align_groups(model, settings),
        steps=settings.align_steps,
        warmup=0.0,
        cooldown=1.0,
        objective=objective,
    )
    assert job.data is not None
    with counted(model) as runs:
        fit(model, stage, job.data, config=job.recipe.train, seed=0)
    return model, runs, objective


def test_components_run_once_per_example_and_projectors_come_out_the_same(tmp_path: Path) -> None:
    kept, few, objective = aligned(tmp_path / "kept", align_cache="memory")
    plain, many, other = aligned(tmp_path / "plain", align_cache="off")
    assert isinstance(objective, CachedAlign) and other is supervised
    # 8 examples and 8 held out in batches of 4, and one batch to prove that the logits are the hybrid's.
    assert few == [5, 5] and many == [12, 12]
    moved = compose(config_of(**OUTPUT), tiny_pair()).mixtures["blocks.0"].experts.state_dict()
    ours, theirs = (m.mixtures["blocks.0"].experts.state_dict() for m in (kept, plain))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5, msg=name)
        assert torch.equal(tensor, moved[name]) == name.startswith("enter"), name
    again, _, _ = aligned(tmp_path / "disk", align_cache="disk")
    assert all(torch.equal(t, again.mixtures["blocks.0"].experts.state_dict()[n]) for n, t in ours.items())
    assert not list((tmp_path / "disk").rglob("*.bin"))  # its room vanishes with it


def test_held_out_losses_come_from_the_same_store(tmp_path: Path) -> None:
    settings = config_of(**OUTPUT)
    model, job = compose(settings, tiny_pair()), job_in(tmp_path)
    objective = align_objective(model, job, config_of(**OUTPUT, align_cache="memory"), quiet=True)
    assert job.data is not None and job.validation is not None
    model.eval()
    with torch.no_grad():
        objective(model, job.data.batch(0))
        for part in job.validation.in_order():
            batch = job.validation.take(part)
            with counted(model) as runs:
                found = objective(model, batch)
            assert runs == [0, 0]
            torch.testing.assert_close(found, supervised(model, batch), rtol=1e-5, atol=1e-4)


def test_auto_keeps_only_what_is_met_again_and_fits(tmp_path: Path) -> None:
    def objective(**config: Any) -> Any:
        settings = config_of(**{**OUTPUT, **config})
        model = compose(settings, pair)
        return align_objective(model, job, settings, quiet=True)

    pair, job = tiny_pair(), job_in(tmp_path)
    assert isinstance(objective(), CachedAlign)
    assert objective(align_steps=3) is supervised  # 12 of 8 examples: most are met once
    assert objective(align_cache_gib=1e-6) is supervised
    assert objective(align="full") is supervised
    assert objective(num_blocks=2) is supervised
    for config, reason in (
        ({"align": "full"}, "the input projectors learn"),
        ({"num_blocks": 2}, "later blocks read what learning projectors wrote"),
        ({"align_weights": True}, "learning mixture weights change what components read"),
    ):
        assert reason in str(why_not_cached(config_of(**{**OUTPUT, **config})))
        with pytest.raises(ValueError, match=f"align_cache=memory: .*{reason}"):
            objective(**config, align_cache="memory")
    with pytest.raises(ValueError, match=r"align_cache_gib=1e-06: what the components say about \d+ tokens takes"):
        objective(align_cache="disk", align_cache_gib=1e-6)


def test_a_component_that_says_more_than_its_head_is_refused(tmp_path: Path) -> None:
    settings = config_of(**OUTPUT)
    model, job = compose(settings, tiny_pair()), job_in(tmp_path)
    plain = type(model.components[1]).forward

    def capped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = torch.tanh(out.logits)
        return out

    model.components[1].forward = capped.__get__(model.components[1])  # type: ignore[method-assign]
    objective = align_objective(model, job, settings, quiet=True)
    with pytest.raises(ValueError, match=r"align_cache: logits from kept activations differ by .*align_cache: off"):
        objective(model, job.data.batch(0))  # type: ignore[union-attr]


def test_rows_come_back_as_they_were_kept() -> None:
    store = Store({0: 2, 1: 3}, 5, torch.float32)
    rows: list[dict[int, Tensor]] = [{m: torch.randn(n, 2 + m) for m in (0, 1)} for n in (2, 3)]
    assert [store.add(row) for row in rows] == [0, 1]
    back = store.read(1, [1, 0, 1], 4)
    assert back.shape == (3, 4, 3) and torch.equal(back[0, :3], rows[1][1]) and torch.equal(back[1, :2], rows[0][1])
    assert (back[1, 2:] == 0).all() and (back[:, 3] == 0).all()
    with pytest.raises(AssertionError, match="more tokens than there is room for"):
        store.add(rows[0])
