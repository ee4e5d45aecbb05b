"""What is said of a pool: counted by hand on one small enough, measured on episodes whose answer is known."""

from typing import Any

import pytest
import torch
from torch import nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.episodic import EpisodicModel
from mixwright.evaluation.pool import has_pool, place_of, pool_of
from mixwright.evaluation.pool_episode import best_strength, explain_episode
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.ops.digest import tensor_digest
from mixwright.ops.hard_concrete import LIMIT
from mixwright.report.pool_page import pool_page
from mixwright.report.pool_terminal import print_pool
from mixwright.routing import Routing, SupportSet


def _by_hand() -> EpisodicModel:
    base = nn.Sequential(nn.Linear(4, 2, bias=False))
    nn.init.ones_(base.get_parameter("0.weight"))
    model = mw.compose("smat", backbone=base, experts=2, feature_width=2)
    assert isinstance(model, EpisodicModel)
    deltas = model.mixture.experts
    assert isinstance(deltas, SparseDeltas)
    with torch.no_grad():
        deltas.delta["0/weight"].fill_(1.0)
        deltas.logits["0/weight"].fill_(-LIMIT)
        deltas.logits["0/weight"][0, 0] = torch.tensor([LIMIT, LIMIT, LIMIT, 0.0])
        deltas.logits["0/weight"][1, 0] = torch.tensor([-LIMIT, -LIMIT, LIMIT, LIMIT])
    return model.eval()


def test_what_is_counted() -> None:
    pool = pool_of(_by_hand(), {"one": Routing(torch.tensor([1.0, 0.0]), 2)}, "one")
    assert pool.weights == 8 and pool.density == (0.5, 0.25) and pool.union == 0.5
    assert pool.fractional == (0.25, 0.0)
    assert pool.overlap[0][1] == 0.5 and pool.overlap[0][0] == 1.0
    assert pool.chance[0][1] == pytest.approx(0.125 / (0.75 - 0.125))
    (cell,) = pool.cells
    assert (cell.place, cell.kind, cell.weights, cell.density) == ("0", "weight", 8, (0.5, 0.25))
    (tensor,) = pool.tensors  # three whole changes and a half, beside eight ones
    assert tensor.change == pytest.approx((3.25 / 8) ** 0.5) and tensor.moved == 0.5


def test_the_chance_level_is_that_of_the_sheet() -> None:
    """p / (2 - p): 0.053 at a density of a tenth."""
    model = _by_hand()
    deltas = model.mixture.experts
    assert isinstance(deltas, SparseDeltas)
    with torch.no_grad():
        deltas.logits["0/weight"].fill_(-LIMIT)
        deltas.logits["0/weight"][:, 0, 0] = LIMIT
    assert pool_of(model).chance[0][1] == pytest.approx(0.125 / (2 - 0.125))


def test_where_a_parameter_lies() -> None:
    assert place_of("encoder.layer.11.attention.query.weight") == ("11", "attention.query.weight")
    assert place_of("encoder.stages.0.layers.2.dwconv.bias") == ("0.2", "dwconv.bias")
    assert place_of("embeddings.cls_token") == ("outside", "embeddings.cls_token")


def test_tasks_stand_by_their_mixture() -> None:
    mixtures = {"a": [0.9, 0.1], "b": [0.1, 0.9], "c": [0.8, 0.2]}
    tasks = pool_of(_by_hand(), {n: Routing(torch.tensor(w), 2) for n, w in mixtures.items()}).tasks
    assert tasks.distances[0][2] == pytest.approx(0.1) and tasks.merges[0].height == pytest.approx(0.1)
    assert {tasks.merges[0].left, tasks.merges[0].right} == {0, 2}


def _model() -> EpisodicModel:
    model = mw.compose("smat", backbone=tiny_backbone("vit"), experts=3)
    assert isinstance(model, EpisodicModel)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.mixture.experts.named_parameters():
            if not name.startswith("multi"):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * (0.05 if name.startswith("delta") else 3))
    return model.eval()


def _items(ways: int = 3, shots: int = 3, seed: int = 0) -> SupportSet:
    draw = torch.Generator().manual_seed(seed)
    shapes = torch.randn(ways, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(ways).repeat(shots)
    return SupportSet(shapes[labels] + 0.3 * torch.randn(ways * shots, 3, 16, 16, generator=draw), labels)


def _episode(model: EpisodicModel, query: SupportSet | None = None, **made: Any) -> Any:
    return explain_episode(model, model.labelled(_items(**made)), query)


def test_an_episode_is_measured_on_its_queries_and_leaves_the_model_as_it_was() -> None:
    model = _model()
    before = tensor_digest(model.backbone)
    found = _episode(model, _items(seed=9))
    assert tensor_digest(model.backbone) == before
    assert found.measured_on == "query items" and found.items == 9
    assert sum(one.weight for one in found.experts) == pytest.approx(1.0)
    assert all(one.without is not None for one in found.experts)
    assert [strength for strength, _ in found.dial] == [0.0, 0.25, 0.5, 0.75, 1.0]
    features = model.frozen_features(_items().inputs), model.frozen_features(_items(seed=9).inputs)
    means = torch.stack([features[0][_items().labels == c].mean(0) for c in range(3)])
    guess = torch.cosine_similarity(features[1][:, None], means[None], dim=-1).argmax(1)
    assert found.dial[0][1].accuracy == pytest.approx(float((guess == _items().labels).double().mean()))
    assert min(m.loss for _, m in found.dial) == dict(found.dial)[best_strength(found)].loss


def test_without_queries_no_item_is_part_of_its_own_prototype() -> None:
    model = _model()
    found = _episode(model)
    assert "left out in turn" in found.measured_on and found.items == 9
    support = _items()
    features = model.frozen_features(support.inputs)
    right: list[bool] = []
    for i, label in enumerate(support.labels.tolist()):
        rest = torch.arange(9) != i
        means = torch.stack([features[rest & (support.labels == c)].mean(0) for c in range(3)])
        right.append(int(torch.cosine_similarity(features[i][None], means, dim=-1).argmax()) == label)
    assert found.dial[0][1].accuracy == pytest.approx(sum(right) / 9)


def test_one_example_of_each_class_measures_nothing() -> None:
    found = _episode(_model(), shots=1)
    assert found.items == 0 and found.dial[0][1] is None and found.experts[0].without is None
    assert len(found.moving) == 3


def test_the_example_that_moves_the_choice_most_stands_first() -> None:
    model = _model()
    with torch.no_grad():
        model.mixture.router.get_buffer("temperature").fill_(0.5)
    support = _items()
    inputs = support.inputs.clone()
    inputs[4] = 40 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(3))
    found = explain_episode(model, model.labelled((inputs, support.labels)))
    assert len(found.moving) == 9
    assert [one.moves for one in found.moving] == sorted((one.moves for one in found.moving), reverse=True)
    assert found.moving[0].moves > 0


def test_who_has_a_pool() -> None:
    assert has_pool(_by_hand()) and not has_pool(tiny_backbone("vit"))


def test_the_page_stands_alone_and_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    model = _model()
    name = "<script>alert(1)</script>"
    support = model.labelled(_items())
    episode = explain_episode(model, support, name=name, items=["<b>x</b>"] * 9)
    routed: dict[str, Routing] = {name: model.settled_routing(support.support), "other": Routing(torch.ones(3) / 3, 3)}
    pool = pool_of(model, routed, name)
    page = pool_page(pool, [episode])
    assert "<script" not in page and "<b>x" not in page and "http:" not in page and "https:" not in page
    for heading in ("Where each expert acts", "How alike the experts are", "Tasks by their mixture", "What moves most"):
        assert heading in page
    assert "left out in turn" in page and "flatter" in page and "The strength dial" in page
    assert "It takes two tasks" in pool_page(pool_of(model))
    print_pool(pool, Console(highlight=False, width=160), [episode])
    shown = capsys.readouterr().out
    assert "strength" in shown and "expert-0" in shown and "moves most" in shown
