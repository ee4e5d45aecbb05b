"""What is read off a model routed by task, against numbers worked out by hand and against its own matrices."""

import json
import math

import pytest
import torch

from mixwright.evaluation.explain import explain
from mixwright.evaluation.task_routing import is_task_routed, shape_of, task_routing
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import TaskRouter

from .task_model import KINDS, task_model

TASKS = ("topic", "mood", "topic again")
LOGITS = torch.tensor([[9.0, -9, -9, -9], [-9, 9, -9, -9], [9, -9, -9, -9]])


def test_shapes_of_tables_worked_out_by_hand() -> None:
    one_each = torch.eye(2).double()[:, None]
    assert shape_of(one_each) == {"usage": 1.0, "peakiness": 1.0, "separation": 1.0}
    uniform = torch.full((3, 2, 4), 0.25).double()
    assert shape_of(uniform) == pytest.approx({"usage": 1.0, "peakiness": 0.0, "separation": 0.0}, abs=1e-12)
    # Rows (1, 0) and (1/2, 1/2): the mean row is (3/4, 1/4), the rows' mean entropy half of log 2.
    mixed = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]).double()
    usage = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert shape_of(mixed) == pytest.approx({"usage": usage, "peakiness": 0.5, "separation": usage - 0.5})
    assert shape_of(torch.ones(3, 1, 1).double()) == {"usage": None, "peakiness": None, "separation": None}


def test_numbers_of_gates_and_tables() -> None:
    found = task_routing(task_model(logits=LOGITS))
    table = found.routers[0]
    assert table.sparsity == 0.25
    p = 1 / (1 + math.exp(-9))
    assert table.discreteness == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2))
    assert table.weights[0][0] == pytest.approx([p / (p + 3 * (1 - p)), *[(1 - p) / (p + 3 * (1 - p))] * 3])
    assert table.positions == [""] and table.agreement == pytest.approx(1.0) and found.agreement == pytest.approx(1.0)


def test_tasks_with_equal_rows_are_one_branch() -> None:
    found = task_routing(task_model(logits=LOGITS))
    assert (found.merges[0].left, found.merges[0].right, found.merges[0].height) == (0, 2, 0.0)
    p = 1 / (1 + math.exp(-9))
    assert found.distances[0][1] == found.distances[2][1] == pytest.approx((2 * p - 1) / (p + 3 * (1 - p)))
    assert sorted(found.order) == [0, 1, 2] and abs(found.order.index(0) - found.order.index(2)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_shares_and_changes_are_those_of_the_matrices(kind: str) -> None:
    model = task_model(kind)
    found = task_routing(model)
    for layer in found.layers:
        mixture = model.mixtures[layer.site]
        experts, table = mixture.experts, mixture.router.table().detach()
        down, up = experts.factors(table)
        update = down.mT @ up / experts.rank
        assert layer.size == pytest.approx(update.norm(dim=(1, 2)).tolist(), rel=1e-4)
        wanted = update.norm(dim=(1, 2)) / mixture.base.weight.norm()
        assert layer.change == pytest.approx(wanted.tolist(), rel=1e-4)
        assert len(layer.share[0]) == (2 if kind == "ordered" else 1)
        assert all(sum(order) == pytest.approx(1.0) for task in layer.share for order in task)
        assert [layer.overlap[i][i] for i in range(4)] == pytest.approx([1.0] * 4)
    if kind in ("poly", "tensor"):
        layer, mixture = found.layers[0], model.mixtures[found.layers[0].site]
        table = mixture.router.table().detach()
        down, up = mixture.experts.factors(table)
        for expert in range(4):
            own_down, own_up = mixture.experts.factors(table * torch.nn.functional.one_hot(torch.tensor(expert), 4))
            part = (own_down.mT @ up + down.mT @ own_up) / (2 * mixture.experts.rank)
            update = down.mT @ up / mixture.experts.rank
            share = (part * update).sum((1, 2)) / update.square().sum((1, 2))
            assert [task[0][expert] for task in layer.share] == pytest.approx(share.tolist(), abs=1e-5)


def test_heads_are_shown_one_by_one_or_as_their_mean() -> None:
    eight = task_routing(task_model("mhr"))
    assert eight.routers[0].positions == ["mean of 8 heads"] and len(eight.routers[0].weights[0]) == 1
    assert task_routing(task_model("ordered")).routers[0].positions == ["order 1", "order 2"]


def test_a_router_of_many_sites_is_one_table() -> None:
    found = task_routing(task_model(shared=True))
    assert len(found.routers) == 1 and found.routers[0].sites == [layer.site for layer in found.layers]
    assert found.agreement is None and {layer.router for layer in found.layers} == {0}


def test_agreement_tells_layers_that_group_the_tasks_otherwise() -> None:
    rows = [torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 0, 1], [0, 0, 1], [1, 0, 0]])]
    alike = iter([*rows, *rows])
    found = task_routing(task_model(experts=3, router=lambda _: TaskRouter(next(alike))))
    assert found.agreement == pytest.approx(1.0), "other experts, the same tasks together"
    other = iter([rows[0], rows[0][[0, 2, 1]], rows[0], rows[0]])
    assert task_routing(task_model(experts=3, router=lambda _: TaskRouter(next(other)))).agreement < 0.6  # type: ignore[operator]
    flat = task_routing(task_model(experts=3, router=lambda _: TaskRouter(torch.ones(3, 3))))
    assert flat.agreement is None and flat.routers[0].discreteness is None


def test_constant_routers_give_every_task_the_same_row() -> None:
    model = task_model(tasks=(), router=lambda _: ConstantRouter(torch.ones(4)))
    found = task_routing(model)
    assert found.tasks == ["any"] and found.merges == [] and found.order == [0]
    assert found.routers[0].weights == [[[1.0] * 4]]


def test_json_has_plain_numbers_of_six_digits() -> None:
    found = task_routing(task_model())
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["tasks"] == list(TASKS) and plain["cost"]["stored"] == found.cost["stored"]
    assert plain["layers"][0]["share"][0][0][0] == pytest.approx(found.layers[0].share[0][0][0], rel=1e-5)
    assert len(str(plain["layers"][0]["size"][0]).lstrip("0.")) <= 7


def test_the_cost_is_what_is_stored() -> None:
    model = task_model("ordered", shared=True)
    cost = task_routing(model).cost
    parameters = dict.fromkeys(
        p for m in model.mixtures.values() for part in (m.router, m.experts) for p in part.parameters()
    )
    assert cost["stored"] + cost["router"] == sum(p.numel() for p in parameters)
    assert cost["router"] == 3 * 2 * 4 == 3 * cost["router_per_task"]
    assert cost["merged"] == sum(2 * (m.experts.d_in + m.experts.d_out) for m in model.mixtures.values())


def test_refusals() -> None:
    from mixwright.backbones.tiny import tiny_backbone
    from mixwright.composition.model import ComposedModel

    bare = ComposedModel(tiny_backbone("llama"), {}, ())
    assert not is_task_routed(bare)
    with pytest.raises(ValueError, match="not routed by task"):
        task_routing(bare)
    with pytest.raises(ValueError, match="routed by task: every token"):
        explain(task_model(), None, "a text")
    broken = torch.zeros(3, 4)
    broken[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has weights that are not finite"):
        task_routing(task_model(logits=broken))
    sizes = iter([3, 2, 3, 3])
    with pytest.raises(ValueError, match="k_proj has 2 tasks, others 3"):
        task_routing(task_model(router=lambda _: TaskRouter(torch.ones(next(sizes), 4))))
