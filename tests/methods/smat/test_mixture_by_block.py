"""A mixture for each block of the backbone: what it computes, learns, keeps and tells, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.support import labelled
from mixwright.data.episodes import Episode
from mixwright.errors import CatalogError
from mixwright.evaluation.pool import pool_of
from mixwright.evaluation.pool_episode import explain_episode
from mixwright.methods.smat.classifier import FewShotClassifier
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.episode_loss import EpisodeLoss
from mixwright.methods.smat.exporting import MADE_FROM
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.sparsity_term import sparsity_term
from mixwright.methods.smat.watch import Watch
from mixwright.ops.digest import tensor_digest
from mixwright.ops.hard_concrete import mask
from mixwright.routing import Condition, Routing, SupportSet

from .pools import fresh_pool, moved

SUPPORT = SupportSet(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(3).repeat(2))
LABELS = SUPPORT.labels
BLOCKS = ("outside", "layers.0", "layers.1")


def pool(backbone: nn.Module | str = "vit", **config: Any) -> FewShotModel:
    """Moved, with keys that differ from block to block."""
    model = moved(fresh_pool(backbone, mixture="block", **config))
    with torch.no_grad():
        model.router.tokens.mul_(100)
        model.router.keys.add_(torch.randn(model.router.keys.shape, generator=torch.Generator().manual_seed(3)))
        model.router.temperature.fill_(0.5)
    return model


def mixtures(seed: int = 0, experts: int = 3) -> Tensor:
    found = torch.rand(len(BLOCKS), experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return found / found.sum(1, keepdim=True)


def rows(model: FewShotModel) -> dict[str, int]:
    """Parameter -> row of its block, by hand."""
    return {n: 1 + int(n.split(".")[1]) if n.startswith("layers.") else 0 for n in model.deltas.names}


def test_each_parameter_is_mixed_as_its_block_says() -> None:
    model, weights = pool(), mixtures().float()
    assert model.deltas.blocks == BLOCKS
    base, found = model.pristine(), model.weights_for(Routing(weights, 3))
    assert set(found) == set(base)
    for name, row in rows(model).items():
        share = torch.einsum("m,m...->...", weights[row], mask(model.deltas.logits_of(name)))
        torch.testing.assert_close(found[name], base[name] + share * model.deltas.change_of(name))
    change = model.deltas(Routing(weights, 3))
    for name in base:
        torch.testing.assert_close(found[name], base[name] + change[name])


@pytest.mark.parametrize("training", [True, False])
def test_one_mixture_for_all_and_the_same_for_each_block_are_one_to_the_bit(training: bool) -> None:
    model, one = pool().train(training), torch.tensor([0.2, 0.5, 0.3])
    whole = moved(fresh_pool()).train(training)
    with torch.set_grad_enabled(training):
        expected = whole.weights_for(Routing(one, 3))
        for weights in (one, one.expand(3, 3)):
            found = model.weights_for(Routing(weights, 3))
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_gradients_are_those_of_autograd_in_float64() -> None:
    model = pool().double()
    deltas, base = model.deltas, {n: t.double() for n, t in model.pristine().items()}
    for parameter in deltas.parameters():
        parameter.requires_grad_()
    draw = torch.Generator().manual_seed(4)
    cotangents = {name: torch.randn(t.shape, generator=draw, dtype=torch.float64) for name, t in base.items()}
    found: list[tuple[Tensor, ...]] = []
    for by_hand in (False, True):
        weights = mixtures(1).requires_grad_()
        theta = deltas.onto(base, Routing(weights, 3)) if not by_hand else {
            name: base[name]
            + torch.einsum("m,m...->...", weights[row], mask(deltas.logits_of(name))) * deltas.change_of(name)
            for name, row in rows(model).items()
        }  # fmt: skip
        total = torch.stack([(theta[name] * cotangents[name]).sum() for name in theta]).sum()
        leaves = [weights, *deltas.delta.values(), *deltas.logits.values()]
        found.append(torch.autograd.grad(total, leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert bool((found[0][0] != 0).all())


def test_episodes_of_an_update_taken_together_are_as_one_by_one() -> None:
    model = pool().double().train()
    for parameter in model.deltas.parameters():
        parameter.requires_grad_()
    draw = torch.Generator().manual_seed(4)
    found: list[tuple[Tensor, ...]] = []
    for together in (True, False):
        weights = [mixtures(seed).requires_grad_() for seed in (1, 2)]
        routings = [Routing(each, 3) for each in weights]
        thetas = model.weights_for_each(routings) if together else [model.weights_for(each) for each in routings]
        draw.manual_seed(4)
        parts = [
            (theta[name] * torch.randn(theta[name].shape, generator=draw, dtype=torch.float64)).sum()
            for theta in thetas
            for name in theta
        ]
        leaves = [*weights, *model.deltas.delta.values(), *model.deltas.logits.values()]
        found.append(torch.autograd.grad(torch.stack(parts).sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_router_chooses_for_each_block_by_its_keys() -> None:
    whole, by_block = fresh_pool().eval(), fresh_pool(mixture="block").eval()
    apart = by_block.routing(SUPPORT).weights
    assert apart.shape == (3, 3) and not torch.allclose(apart[0], apart[1]) and not torch.allclose(apart[1], apart[2])
    torch.testing.assert_close(apart.sum(-1), torch.ones(3))
    with torch.no_grad():
        by_block.load_state_dict(whole.state_dict() | {
            "mixture.router.keys": whole.router.keys[:, None] * torch.tensor([1.0, 2.0, 0.0])[:, None]
        })  # fmt: skip
    found, gates = by_block.routing(SUPPORT).weights, whole.router.logits(whole.frozen_features(SUPPORT.inputs), LABELS)
    for row, factor in enumerate((1.0, 2.0, 0.0)):
        expected = torch.sigmoid(factor * gates / whole.router.temperature)
        torch.testing.assert_close(found[row], expected / expected.sum())


def test_blocks_learn_mixtures_of_their_own() -> None:
    config = SmatConfig(experts=3, mixture="block", feature_width=None)
    model = pool().train()
    model.mixture.requires_grad_(True)
    told: list[Tensor] = []
    torch.manual_seed(0)
    EpisodeLoss(config, told.append)(model, _episode()).backward()
    slopes = model.router.keys.grad
    assert slopes is not None and slopes.shape == model.router.keys.shape
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert bool(slopes[:, one].any()) and not torch.allclose(slopes[:, one], slopes[:, other])
    assert told[0].shape == (3, 3)
    watch = Watch(config)
    watch.seen = told * 20
    numbers = watch.look(model)
    assert 0 < numbers["routing.entropy"] <= numbers["routing.usage"] <= 1 and 0 < numbers["routing.least"] <= 1


def test_an_expert_is_asked_to_be_sparse_by_its_mean_over_blocks_of_their_sizes() -> None:
    model, weights = pool(), mixtures(2).float()
    size = torch.zeros(3)
    for name, row in rows(model).items():
        size[row] += model.deltas.change_of(name).numel()
    mean = (size[:, None] * weights).sum(0) / size.sum()
    torch.testing.assert_close(model.deltas.mean_over_blocks(model.deltas.by_block(weights)), mean)
    config = SmatConfig(experts=3, mixture="block", distillation=0.0, gate_penalty=0.0)
    model.train()
    model.mixture.requires_grad_(True)
    with model.routed_by(Routing(weights, 3)):
        EpisodeLoss(config)(model, _episode()).backward()
    (expected,) = torch.autograd.grad(
        sparsity_term(model.deltas, mean[None], config.sparsity, config.floor), [model.deltas.multipliers]
    )
    torch.testing.assert_close(model.deltas.multipliers.grad, expected)


@pytest.mark.parametrize("storage", ["exact", "compact"])
def test_it_is_saved_and_loaded_to_the_bit(storage: str, tmp_path: Path) -> None:
    model = pool(storage=storage)
    model.remember("mine", SUPPORT)
    model.save_pretrained(tmp_path / "pool")
    again = mw.load(tmp_path / "pool", backbone=tiny_backbone("vit"))
    assert isinstance(again, FewShotModel) and again.deltas.blocks == BLOCKS
    again.eval()
    assert torch.equal(again.routing(SUPPORT).weights, model.routing(SUPPORT).weights)
    assert again.remembered("mine").weights.shape == (3, 3)
    assert again.router.keys.shape == (3, 3, model.router.keys.shape[-1])
    again.save_pretrained(tmp_path / "again")
    third = mw.load(tmp_path / "again", backbone=tiny_backbone("vit")).eval()
    with torch.no_grad():
        one, two = (each.weights_for(each.routing(SUPPORT)) for each in (again, third))  # type: ignore[operator]
        if storage == "exact":
            before = model.weights_for(model.routing(SUPPORT))
            assert all(torch.equal(one[name], before[name]) for name in before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_that_says_another_mixture_is_refused(tmp_path: Path) -> None:
    for kind, other in (("block", "whole"), ("whole", "block")):
        folder = tmp_path / kind
        moved(fresh_pool(mixture=kind)).save_pretrained(folder)
        text = (folder / "composition.yaml").read_text("utf-8")
        assert text.count(f'"{kind}"') + text.count(f"mixture: {kind}") == 1
        (folder / "composition.yaml").write_text(
            text.replace(f"mixture: {kind}", f"mixture: {other}").replace(f'"{kind}"', f'"{other}"'), "utf-8"
        )
        with pytest.raises(CatalogError, match="router"):
            mw.load(folder, backbone=tiny_backbone("vit"))


def test_adapting_in_place_is_a_pass_under_the_support_and_is_taken_back_to_the_bit() -> None:
    model, x = pool(), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    before = tensor_digest(model.backbone)
    functional = model(x, condition=Condition(support=SUPPORT)).last_hidden_state
    with model.adapted(SUPPORT) as routing:
        assert routing.weights.shape == (3, 3)
        assert torch.equal(model(x).last_hidden_state, functional)
        with model.adapted(model.route(SUPPORT), strength=0.5):
            assert not torch.equal(model(x).last_hidden_state, functional)
        assert torch.equal(model(x).last_hidden_state, functional)
    assert tensor_digest(model.backbone) == before
    model.commit(Routing(mixtures().float(), 3))
    assert tensor_digest(model.backbone) != before
    model.rollback()
    assert tensor_digest(model.backbone) == before
    model.remember("mine", SUPPORT, cached=True)
    for _ in range(2):
        with model.adapted("mine"):
            assert torch.equal(model(x).last_hidden_state, functional)
        model._cache.clear()


def test_mixtures_of_another_number_of_blocks_are_refused() -> None:
    model = pool()
    for weights in (torch.full((4, 3), 1 / 3), torch.full((2, 3), 1 / 3), torch.full((3, 2), 1 / 2)):
        with pytest.raises(ValueError, match=r"expected \(3,\) or, one for each block, \(3, 3\)"):
            model.commit(Routing(weights, 3))
        with pytest.raises(ValueError, match="one for each block"):
            model.weights_for(Routing(weights, 3))
    with pytest.raises(ValueError, match=r"expected \(3,\)\."):
        moved(fresh_pool()).commit(Routing(torch.full((3, 3), 1 / 3), 3))
    assert model.depth == 0 and model.is_pristine()


def test_a_route_tells_the_mean_and_each_block() -> None:
    model = pool()
    route = model.route(SUPPORT, resamples=4)
    by_block = route.routing.weights
    assert by_block.shape == (3, 3) and route.weights.shape == route.spread.shape == (3,)
    torch.testing.assert_close(route.weights, model.deltas.mean_over_blocks(by_block))
    assert 0 < route.entropy < 1 and 0 < route.doubt < 1
    for m in range(3):
        alone = torch.zeros(3, 3)
        alone[:, m] = by_block[:, m]
        added = torch.cat([change.detach().flatten() for change in model.deltas(Routing(alone, 3)).values()])
        assert float(route.norms[m]) == pytest.approx(float(added.norm()), rel=1e-4)
    text = str(route)
    assert all(sum(line.strip().startswith(block) for line in text.splitlines()) == 1 for block in BLOCKS)
    edited = route.with_weights({"expert-2": 0})
    assert bool((edited.routing.weights[:, 2] == 0).all()) and float(edited.norms[2]) == 0
    torch.testing.assert_close(edited.routing.weights.sum(1), torch.ones(3))
    with model.adapted(edited), pytest.raises(ValueError, match="every weight is 0"):
        route.with_weights({0: 0, 1: 0, 2: 0})


def test_a_route_of_one_expert_everywhere_has_no_entropy() -> None:
    model = pool()
    with model.only("expert-1"):
        route = model.route(SUPPORT, resamples=2)
    assert route.leader == "expert-1" and route.entropy == 0 and route.doubt == 0
    assert route.routing.weights.shape == (3, 3) and str(route)


def test_experts_and_parameters_can_be_left_out() -> None:
    model = pool()
    model.set_active(["expert-0", "expert-2"])
    weights = model.routing(SUPPORT).weights
    assert bool((weights[:, 1] == 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    left_out = model.forbid("layers.1.*")
    assert left_out and not set(left_out) & set(model.weights_for(model.routing(SUPPORT)))


def test_it_classifies_and_the_classifier_is_kept() -> None:
    model, asked = pool(), SUPPORT.inputs + 0.01
    with FewShotClassifier(model) as classifier:
        classifier.fit(SUPPORT)
        assert classifier.route_.weights.shape == (3, 3)
        expected = classifier.predict_proba(asked)
        classifier.remember("mine")
    with FewShotClassifier.from_model(model, "mine") as again:
        torch.testing.assert_close(torch.tensor(again.predict_proba(asked)), torch.tensor(expected))


def test_an_export_is_the_adapted_backbone_and_says_each_blocks_mixture(tmp_path: Path) -> None:
    model = pool()
    with model.adapted(SUPPORT) as routing:
        expected = tensor_digest(model.backbone)
    model.export(SUPPORT, tmp_path / "out")
    plain = type(model.backbone).from_pretrained(tmp_path / "out")
    assert tensor_digest(plain) == expected
    said = json.loads((tmp_path / "out" / MADE_FROM).read_text("utf-8"))
    assert set(said["weights_by_block"]) == set(BLOCKS)
    assert said["weights_by_block"]["layers.1"]["expert-0"] == pytest.approx(float(routing.weights[2, 0]))
    assert sum(said["weights_of_experts"].values()) == pytest.approx(1)
    assert "the mean over blocks" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert any("each block: `outside`, `layers.0`, `layers.1`" in line for line in model.card_lines())


def test_it_is_explained() -> None:
    model = pool()
    model.remember("first", SUPPORT)
    other = SupportSet(SUPPORT.inputs.flip(0) * 3, SUPPORT.labels)
    tasks = {"second": model.settled_routing(other), "even": Routing(torch.full((3,), 1 / 3), 3)}
    found = pool_of(model, tasks, shown="second")
    assert found.tasks.names == ("first", "second", "even")
    torch.testing.assert_close(torch.tensor(found.tasks.weights).sum(1), torch.ones(3))
    first, even = model.remembered("first").weights, torch.full((3, 3), 1 / 3)
    apart = model.deltas.mean_over_blocks((first - even).abs()).sum() / 2
    assert found.tasks.distances[0][2] == pytest.approx(float(apart), rel=1e-5)
    base = {name: tensor.clone() for name, tensor in model.pristine().items()}
    with model.adapted(tasks["second"]):
        now = dict(model.backbone.named_parameters())
        for one in found.tensors:
            change = float((now[one.name] - base[one.name]).norm() / base[one.name].norm())
            assert one.change == pytest.approx(change, rel=1e-3)
    episode = explain_episode(model, labelled(SUPPORT, next(model.backbone.parameters()), model.read))
    assert len(episode.experts) == 3 and sum(one.weight for one in episode.experts) == pytest.approx(1)
    assert all(one.without is not None for one in episode.experts) and len(episode.moving) == 6
    assert all(0 <= one.moves <= 1 for one in episode.moving)


def test_plain_torch_models_have_blocks_and_one_block_is_refused() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 8))
    model = pool(layers, feature_width=8)
    assert model.deltas.blocks == ("1", "3")
    assert model.route(SUPPORT).routing.weights.shape == (2, 3)
    with pytest.raises(ValueError, match="lie in one block"):
        fresh_pool(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)), feature_width=8, mixture="block")
    with pytest.raises(ValueError, match="lie in one block"):
        fresh_pool(mixture="block", include=("layers.1.*",))


@pytest.mark.parametrize("settings", [{"experts": 1}, {"router": "uniform"}, {"changes": "own"}])
def test_where_nothing_is_chosen_for_a_block_it_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mixture 'block'"):
        fresh_pool(mixture="block", **settings)


def _episode() -> Episode:
    draw = torch.Generator().manual_seed(5)
    return Episode(
        SUPPORT.inputs, SUPPORT.labels, torch.randn(6, 3, 16, 16, generator=draw), SUPPORT.labels, {"domain": "noise"}
    )
