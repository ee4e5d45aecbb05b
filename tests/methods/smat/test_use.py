"""Routes, adaptations in place and by name, and what a person may forbid."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.hf import build_backbone
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.routes import remember_tasks
from mixwright.data.episodes import Episode
from mixwright.files import sha256_file
from mixwright.methods.smat.model import FewShotModel
from mixwright.ops.digest import tensor_digest
from mixwright.routing import Condition, Routing, SupportSet

from .pools import fresh_pool, moved


def pool(backbone: str | nn.Module = "vit", **config: Any) -> FewShotModel:
    return moved(fresh_pool(backbone, **config))


def images(count: int = 6, seed: int = 0, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(3).repeat(2)
SUPPORT = SupportSet(images(), LABELS)


def test_a_route_says_who_acts_and_how_sure() -> None:
    route = pool().route(SUPPORT)
    assert route.names == ("expert-0", "expert-1", "expert-2") and route.novelty is None
    assert float(route.weights.sum()) == pytest.approx(1) and 0 < route.entropy <= 1
    assert route.leader == route.names[int(route.weights.argmax())]
    text = str(route)
    assert text.startswith(route.leader) and "no tasks are remembered" in text


def test_norms_of_a_route_are_those_of_what_is_added() -> None:
    for unit in ("weight", "row", "tensor"):
        model = pool(granularity=unit)
        route = model.route(SUPPORT, resamples=0)
        for m in range(3):
            alone = torch.zeros(3)
            alone[m] = route.weights[m]
            added = model.deltas(Routing(alone, 3))
            norm = torch.cat([change.detach().flatten() for change in added.values()]).norm()
            assert float(route.norms[m]) == pytest.approx(float(norm), rel=1e-4)


def test_doubt_is_less_with_more_and_more_alike_examples() -> None:
    model = pool()
    with torch.no_grad():
        model.router.tokens.mul_(100)  # keys that tell tasks apart
        model.router.keys.mul_(20)
    few = model.route(SUPPORT)
    copies = SupportSet(images().repeat(8, 1, 1, 1), LABELS.repeat(8))
    assert few.doubt > 0 and model.route(copies).doubt < few.doubt
    assert torch.equal(model.route(SUPPORT).spread, few.spread)
    assert not bool(model.route(SUPPORT, resamples=0).spread.any())


def test_novelty_is_of_the_tasks_that_are_remembered() -> None:
    model = pool()
    base = {"bright": images(6, 1) + 2, "dark": images(6, 2) - 2}
    episodes = [
        Episode(images + 0.1 * torch.randn(6, 3, 16, 16), LABELS, images, meta={"domain": domain})
        for domain, images in base.items()
        for _ in range(6)
    ]
    assert remember_tasks(model, episodes) == 12
    near, far = model.route(episodes[0]), model.route((30 * images(6, 7), LABELS))
    assert near.novelty is not None and far.novelty is not None
    assert near.novelty.domain == "bright" and near.novelty.distance < far.novelty.distance
    assert far.novelty.share == 1.0 and near.novelty.share < 1.0
    assert "bright" in str(near)


def test_weights_can_be_set_by_hand() -> None:
    model = pool()
    route = model.route(SUPPORT)
    edited = route.with_weights({"expert-2": 0, 1: 1})
    assert edited.weights[2] == 0 and float(edited.weights.sum()) == pytest.approx(1)
    assert float(edited.norms[1]) == pytest.approx(float(model.deltas.norms()[1] * edited.weights[1]), rel=1e-5)
    assert "by hand" in str(edited)
    with model.adapted(edited):
        inside = tensor_digest(model.backbone)
    with model.adapted(edited.routing):
        assert tensor_digest(model.backbone) == inside
    for wrong in ({"nobody": 1.0}, {0: -1.0}, {0: float("nan")}, {7: 1.0}, {0: 0, 1: 0, 2: 0}):
        with pytest.raises(ValueError):
            route.with_weights(wrong)


def test_supports_of_every_form_are_the_same_support() -> None:
    model = pool()
    expected = model.route(SUPPORT).weights
    words = ["owl", "ant", "bee"] * 2
    for given in (
        (images(), LABELS),
        (images().numpy(), LABELS.tolist()),
        (list(images()), LABELS.numpy()),
        (images(), words),
        (images(), np.array(words)),
        Episode(images(), LABELS, images(1)),
    ):
        torch.testing.assert_close(model.route(given).weights, expected)
    assert model.route((images(), words)).classes == ("ant", "bee", "owl")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((images(0), torch.zeros(0, dtype=torch.long)), "empty"),
        (([], []), "empty"),
        ((images(), torch.zeros(6, dtype=torch.long)), "one class"),
        ((images(), ["owl"] * 6), "one class"),
        ((images(), torch.tensor([0, 0, 2, 2, 0, 2])), "class 1 has no item"),
        ((images(), torch.arange(5)), "for 6 items"),
        ((images(), torch.full((6,), -1)), "expected 0"),
        ((images() / 0, LABELS), "NaN or infinite"),
        ((images(size=9), LABELS), "cannot read items of shape"),
        ((list(images(5)) + [torch.zeros(3, 8, 8)], LABELS), "one size"),
        ((torch.randn(6, 4), LABELS), "cannot read items of shape"),
    ],
)
def test_a_support_with_a_fault_gets_one_clear_error_and_changes_nothing(given: Any, said: str) -> None:
    model = pool()
    before = tensor_digest(model.backbone)
    for call in (model.route, model.commit, model.settled_routing):
        with pytest.raises(ValueError, match=said):
            call(given)
    assert tensor_digest(model.backbone) == before and model.depth == 0


def test_a_support_of_the_wrong_kind_is_named() -> None:
    for given in (images(), "owl.png", (["a", "b"], [0, 1]), (images(), [0.5] * 6), (images(), ["a", 1] * 3)):
        with pytest.raises(TypeError):
            pool().route(given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features of item 2 are not finite"):
        backbone = nn.Linear(3, 4)
        nn.init.ones_(backbone.weight)
        model = mw.compose("smat", backbone=backbone, experts=2, feature_width=4)
        model.route((torch.tensor([[1.0] * 3, [2.0] * 3, [3e38] * 3]), [0, 1, 0]))  # type: ignore[operator]


def _adapts(model: FewShotModel, support: SupportSet, query: Any) -> None:
    """Functional and in-place passes agree to the bit, and everything is taken back to the bit."""
    before = tensor_digest(model.backbone)
    modes = [module.training for module in model.modules()]
    assert model.is_pristine()
    weights = model.weights_for(model.settled_routing(support))
    expected = model.settled_features(query, weights)
    plain = model.settled_features(query)
    with pytest.raises(KeyError), model.adapted(support):
        assert not model.is_pristine()
        assert torch.equal(model.settled_features(query), expected) and not torch.equal(expected, plain)
        assert torch.equal(model.frozen_features(query), plain)
        with model.adapted(support, 0.0):
            assert torch.equal(model.settled_features(query), plain)
            model.commit(support, 0.3)
        raise KeyError
    assert model.is_pristine() and tensor_digest(model.backbone) == before and model.depth == 0
    assert modes == [module.training for module in model.modules()]
    with model.adapted(support, strength=0):
        assert model.is_pristine()


def _convnext() -> nn.Module:
    return build_backbone(
        "convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16}, kind="encoder"
    )


def _clip() -> nn.Module:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build_backbone("clip_vision_model", {**settings, "image_size": 16, "patch_size": 8}, kind="encoder")


def _convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))


@pytest.mark.parametrize("build", [_convnext, _clip, _convolutions, lambda: tiny_backbone("vit")])
def test_backbones_of_images_are_adapted_and_taken_back(build: Any) -> None:
    settings = {"feature_width": 8, "features": "mean"} if build is _convolutions else {}
    _adapts(pool(build(), **settings), SUPPORT, images(3, 5))


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2"])
def test_backbones_of_text_are_adapted_and_taken_back(family: str) -> None:
    ids = torch.randint(4, 200, (6, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    settings: dict[str, Any] = {}
    if family == "gpt2":  # a head, tied to the embeddings

        def mean_state(model: nn.Module, inputs: Any) -> Tensor:
            return model(**inputs, output_hidden_states=True).hidden_states[-1].mean(1)

        settings = {"features": mean_state}
    model = pool(family, **settings)
    if family == "gpt2":
        assert "lm_head.weight" not in model.deltas.names and "transformer.wte.weight" in model.deltas.names
    _adapts(
        model,
        SupportSet({"input_ids": ids, "attention_mask": mask}, LABELS),
        {"input_ids": ids[:2] + 1, "attention_mask": mask[1:3]},
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_adapted_and_taken_back(dtype: torch.dtype) -> None:
    _adapts(pool(tiny_backbone("vit").to(dtype)), SupportSet(images().to(dtype), LABELS), images(3, 5).to(dtype))


def test_a_thousand_switches_leave_every_byte() -> None:
    model = pool(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), feature_width=3)
    draw = torch.Generator().manual_seed(0)
    supports = [SupportSet(torch.randn(6, 4, generator=draw), LABELS) for _ in range(5)]
    assert model.is_pristine()
    for i, support in enumerate(supports):
        model.remember(f"task {i}", support, cached=i % 2 == 0)
    for _ in range(1000):
        place, dial = int(torch.randint(5, (), generator=draw)), float(torch.rand((), generator=draw))
        if model.depth > 3 or (model.depth and dial < 0.4):
            model.rollback()
        else:
            model.commit(f"task {place}", dial if dial < 0.7 else None)
    while model.depth:
        model.rollback()
    assert model.is_pristine()


def test_inside_disabled_the_model_is_pretrained_whatever_is_committed() -> None:
    model, x = pool(), images(2, 9)
    plain = model(x).last_hidden_state
    model.commit(SUPPORT)
    with model.disabled():
        assert torch.equal(model(x).last_hidden_state, plain)
    assert not torch.equal(model(x).last_hidden_state, plain)
    assert model.remove() is model.backbone and torch.equal(model.backbone(x).last_hidden_state, plain)


def test_an_adaptation_is_remembered_by_name_saved_and_forgotten(tmp_path: Path) -> None:
    model = pool()
    kept = model.remember("night birds", (images(), ["owl", "ant", "bee"] * 2), strength=0.5, cached=True)
    with model.adapted(SupportSet(images(), torch.tensor([2, 0, 1] * 2)), 0.5):
        inside = tensor_digest(model.backbone)
    with model.adapted("night birds"):
        assert tensor_digest(model.backbone) == inside
    model.save_pretrained(tmp_path / "pool")
    again = mw.load(tmp_path / "pool", backbone=tiny_backbone("vit"))
    assert isinstance(again, FewShotModel) and again.adaptations == ("night birds",)
    found = again.remembered("night birds")
    assert found.classes == ("ant", "bee", "owl") and found.strength == 0.5
    assert torch.equal(found.prototypes, kept.prototypes)
    with again.adapted("night birds"):
        assert tensor_digest(again.backbone) == inside
    again.forget("night birds")
    with pytest.raises(ValueError, match="no adaptation"):
        again.commit("night birds")
    with pytest.raises(ValueError, match="letters"):
        model.remember("../up", SUPPORT)


def test_a_cached_adaptation_is_used_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pool()
    model.remember("birds", SUPPORT, cached=True)
    calls: list[int] = []
    merged = model.mixture.weights
    monkeypatch.setattr(model.mixture, "weights", lambda *given: calls.append(1) or merged(*given))
    with model.adapted("birds"):
        cached = tensor_digest(model.backbone)
    assert not calls
    with torch.no_grad():
        next(iter(model.deltas.delta.values())).add_(1)
    with model.adapted("birds"):
        assert calls and tensor_digest(model.backbone) != cached


def test_parameters_that_are_forbidden_stay_pretrained() -> None:
    model = pool()
    names = model.forbid("*attention*", "*.bias")
    assert names and any("attention" in name for name in names)
    before = tensor_digest(model.backbone)
    with model.adapted(SUPPORT):
        inside = tensor_digest(model.backbone)
        assert all(inside[name] == before[name] for name in names)
        assert any(inside[name] != before[name] for name in model.deltas.names)
    assert model.forbid() == () and set(model.weights_for(model.routing(SUPPORT))) == set(model.deltas.names)
    with pytest.raises(ValueError, match="names none"):
        model.forbid("*.nowhere")


def test_experts_are_forced_and_frozen() -> None:
    model = pool()
    with model.only("expert-1"):
        route = model.route(SUPPORT)
        assert route.weights.tolist() == [0, 1, 0] and route.doubt == 0 and route.entropy == 0
    model.freeze_expert("expert-1")
    alone = Routing(torch.tensor([0.0, 1.0, 0.0]), 3)
    before = {name: tensor.clone() for name, tensor in model.weights_for(alone).items()}
    model.train()
    optimizer = torch.optim.SGD(model.deltas.parameters(), lr=5.0, weight_decay=0.1)
    model(images(), condition=Condition(support=SUPPORT)).last_hidden_state.square().sum().backward()
    optimizer.step()
    model.deltas.after_step()
    after = model.eval().weights_for(alone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = Routing(torch.tensor([1.0, 0.0, 0.0]), 3)
    assert any(not torch.equal(model.weights_for(other)[name], before[name]) for name in before)


def test_strengths_and_routings_that_are_none_are_refused() -> None:
    model = pool()
    for strength in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            model.commit(SUPPORT, strength)
    with pytest.raises(ValueError, match="routing of"):
        model.commit(Routing(torch.ones(2) / 2, 2))
    with pytest.raises(ValueError, match="nothing to take back"):
        model.rollback()


def test_a_process_that_is_killed_while_adapted_leaves_the_files_as_they_were(tmp_path: Path) -> None:
    model = pool()
    model.remember("birds", SUPPORT)
    model.backbone.save_pretrained(tmp_path / "backbone")  # type: ignore[operator]
    model.save_pretrained(tmp_path / "pool")
    before = {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()}
    script = (
        "import os, signal, sys, mixwright as mw\n"
        "model = mw.load(sys.argv[1], backbone=sys.argv[2])\n"
        "model.commit('birds')\n"
        "assert not model.is_pristine()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pool"), str(tmp_path / "backbone")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert {path: sha256_file(path) for path in tmp_path.rglob("*") if path.is_file()} == before
