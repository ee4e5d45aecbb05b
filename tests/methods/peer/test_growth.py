"""Growth: neutral to the bit until experts are admitted, old ones frozen, optimisers and files that follow."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.experts.neuron import NeuronExperts
from mixwright.methods.peer.growth import admit, freeze_present, grow, open_rows, origins, reserve_slots
from mixwright.methods.peer.layer import PEER
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.unsure import WideningRouter
from mixwright.routing import Condition

D = 32


def layer(grid: tuple[int, int] = (13, 11), **options: Any) -> PEER:
    torch.manual_seed(0)
    made = PEER(D, grid, **{"heads": 3, "top_k": 5, "dim_key": 16, **options})
    made(torch.randn(60, D))
    return made.eval()


def tokens(count: int = 37, seed: int = 1) -> Tensor:
    return torch.randn(2, count, D, generator=torch.Generator().manual_seed(seed))


def outputs(made: PEER) -> list[Tensor]:
    """With and without gradients, of many tokens and of one."""
    with torch.no_grad():
        bare = [made(tokens()), made(tokens(1)), made(tokens(300, 2))]
    return [*bare, made(tokens()).detach(), made(tokens(1)).detach()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_keys": False, "gate": "sigmoid"},
        {"gated": True, "query_norm": "layer"},
        {"values_only": True, "output_gate": True},
        {"row_dim": 8, "key_norm": "layer"},
        {"grid": (64, 64)},
        {"grid": (3, 40)},
    ],
    ids=str,
)
@pytest.mark.parametrize("zero_out", [True, False])
def test_outputs_are_the_same_to_the_bit_until_experts_are_admitted(options: dict[str, Any], zero_out: bool) -> None:
    made = layer(**options)
    before, count = outputs(made), made.router.num_experts
    ids = grow(made.router, made.experts, 4, zero_out=zero_out, source="law", step=7)
    assert ids == range(count, count + 4 * made.router.grid[1])
    assert equal(outputs(made), before)
    grow(made.router, made.experts, 3)
    assert equal(outputs(made), before)
    assert made.router.num_experts == made.experts.num_experts == ids.stop + 3 * made.router.grid[1]
    admit(made.router, made.experts, 0.0)
    assert equal(outputs(made), before)
    admit(made.router, made.experts)
    assert not equal(outputs(made), before)
    assert made.experts.grown is None
    found = made.router(tokens(), Condition()).indices
    assert found is not None and bool((found >= count).any())


def test_rows_of_zero_alone_would_not_be_neutral() -> None:
    made = layer()
    with torch.no_grad():
        before = made(tokens())
        grow(made.router, made.experts, 4)
        made.router.bias_first.zero_()
        change = (made(tokens()) - before).norm() / before.norm()
    assert change > 0.05


def test_admitted_step_by_step_they_win_more_and_more() -> None:
    made = layer(grid=(12, 12))
    count = made.router.num_experts
    grow(made.router, made.experts, 6)
    shares: list[float] = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        admit(made.router, made.experts, progress)
        found = made.router(tokens(200), Condition()).indices
        assert found is not None
        shares.append(float((found >= count).float().mean()))
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[-1] > 0.2 and shares[1] < shares[-1] / 2
    with pytest.raises(ValueError, match="no experts wait"):
        admit(made.router, made.experts)


def test_slots_of_their_own_change_nothing_and_learn() -> None:
    made = layer()
    before = outputs(made)
    grow(made.router, made.experts, 4)
    reserve_slots(made.router, made.experts, 2)
    assert equal(outputs(made), before)
    found = made.router.retrieve(tokens(), Condition())
    assert found.indices.shape[-1] == 7
    assert bool((found.indices[..., :5] < 143).all()) and bool((found.indices[..., 5:] >= 143).all())
    assert found.gates[..., 5:].eq(0).all()
    made.train()
    freeze_present(made.router, made.experts)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=0.05)
    target, losses = torch.randn(2, 37, D), []
    for _ in range(15):
        loss = (made(tokens()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert made.router.extra_gate is not None and made.router.extra_gate.abs().min() > 0
    with pytest.raises(ValueError, match="slots of their own"):
        grow(made.router, made.experts, 1)


def train(made: PEER, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    made.train()
    for step in range(steps):
        optimizer.zero_grad()
        made(tokens(37, 50 + step)).square().sum().backward()
        optimizer.step()
    made.eval()


@pytest.mark.parametrize("gradient", ["dense", "compact"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.SparseAdam])
def test_what_was_there_stays_to_the_bit_while_the_new_learns(
    gradient: str, make: Callable[..., torch.optim.Optimizer]
) -> None:
    if (make is torch.optim.SparseAdam) != (gradient == "compact"):
        pytest.skip("an optimiser for the other kind of gradient")
    made = layer()
    made.experts.table.gradient = gradient  # type: ignore[union-attr]
    grow(made.router, made.experts, 6, zero_out=False)
    admit(made.router, made.experts, 0.999)
    freeze_present(made.router, made.experts)
    admit(made.router, made.experts)
    before = {name: t.clone() for name, t in made.state_dict().items()}
    rows = made.experts.table.rows  # type: ignore[union-attr]
    learning = [rows] if gradient == "compact" else [p for p in made.parameters() if p.requires_grad]
    train(made, make(learning, lr=0.01))
    after = made.state_dict()
    moved = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert moved <= {"router.keys_first", "experts.table.rows"}
    assert torch.equal(after["experts.table.rows"][:143], before["experts.table.rows"][:143])
    assert torch.equal(after["router.keys_first"][:, :13], before["router.keys_first"][:, :13])
    assert not torch.equal(after["experts.table.rows"][143:], before["experts.table.rows"][143:])
    if gradient == "dense":
        assert not torch.equal(after["router.keys_first"][:, 13:], before["router.keys_first"][:, 13:])


def test_optimisers_with_a_past_grow_along_or_are_refused() -> None:
    made = layer()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01)
    train(made, optimizer, 2)
    twin, rows = copy.deepcopy(made), made.experts.table.rows
    kept = optimizer.state[rows]["exp_avg"].clone()
    grow(made.router, made.experts, 2, optimizers=[optimizer])
    assert made.experts.table.rows is rows
    assert torch.equal(optimizer.state[rows]["exp_avg"][:143], kept)
    assert optimizer.state[rows]["exp_avg"][143:].eq(0).all()
    admit(made.router, made.experts)
    train(made, optimizer, 2)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01)
    train(twin, other, 1)
    grow(twin.router, twin.experts, 2)
    with pytest.raises(RuntimeError, match="size|shape"):
        train(twin, other, 1)
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="SGD holds no parameter of this layer that grows"):
        grow(made.router, made.experts, 2, optimizers=[stranger])


@pytest.mark.parametrize("make", [mw.LazyAdamW, mw.RowwiseAdagrad])
def test_our_optimisers_follow_growth_and_leave_frozen_rows(make: Callable[..., Any]) -> None:
    made = layer()
    optimizer = make(made, lr=0.01, weight_decay=0.1)
    train(made, optimizer, 3)
    grow(made.router, made.experts, 3, optimizers=[optimizer], zero_out=False)
    admit(made.router, made.experts, 0.999)
    freeze_present(made.router, made.experts)
    before = made.state_dict()["experts.table.rows"].clone()
    train(made, optimizer, 3)
    after = made.state_dict()["experts.table.rows"]
    assert torch.equal(after[:143], before[:143])
    assert not torch.equal(after[143:], before[143:])


@pytest.mark.parametrize("way", ["waiting", "slots", "admitted", "frozen"])
def test_a_grown_layer_is_saved_and_loaded(way: str) -> None:
    made = layer()
    made.router.ablated = torch.zeros(143, dtype=torch.bool)
    made.router.ablated[5] = True
    before = outputs(made)
    grow(made.router, made.experts, 4, source="medicine", step=3)
    if way == "slots":
        reserve_slots(made.router, made.experts, 2)
        with torch.no_grad():
            made.router.extra_gate.fill_(0.3)  # type: ignore[union-attr]
    if way == "admitted":
        admit(made.router, made.experts)
    if way == "frozen":
        freeze_present(made.router, made.experts)
    buffer = io.BytesIO()
    torch.save(made.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    for fresh in (layer(), layer((17, 11))):
        fresh.load_state_dict(state)
        assert fresh.router.grid == (17, 11) and fresh.experts.num_experts == 187
        assert equal(outputs(fresh), outputs(made))
        assert equal(outputs(fresh), before) == (way in ("waiting", "frozen"))
        assert [origin.source for origin in origins(fresh.experts, [0, 143, 186])] == ["", "medicine", "medicine"]
        if way != "admitted":
            admit(fresh.router, fresh.experts) if way != "slots" else None
    copied = copy.deepcopy(made)
    assert equal(outputs(copied), outputs(made))


def test_where_rows_came_from_is_kept() -> None:
    made = layer()
    assert origins(made.experts, [0])[0].step == 0
    first = grow(made.router, made.experts, 1, source="law, 2026", step=100)
    second = grow(made.router, made.experts, 2, source="ärzte", step=2**40)
    found = origins(made.experts, [0, first[0], first[-1], second[0], second[-1]])
    assert [origin.source for origin in found] == ["", "law, 2026", "law, 2026", "ärzte", "ärzte"]
    assert [origin.step for origin in found] == [0, 100, 100, 2**40, 2**40]
    with pytest.raises(ValueError, match="at most 24 are kept"):
        grow(made.router, made.experts, 1, source="x" * 25)
    assert made.router.num_experts == second.stop


def test_layers_that_share_a_table_grow_one_after_the_other() -> None:
    first = layer()
    second = layer(table=first.experts.table, heads=2)
    before = outputs(first), outputs(second)
    grow(first.router, first.experts, 3)
    assert equal(outputs(second), before[1])
    grow(second.router, second.experts, 3)
    assert first.experts.num_experts == second.router.num_experts == 143 + 33
    assert equal(outputs(first), before[0]) and equal(outputs(second), before[1])
    with pytest.raises(ValueError, match="grow by the same number"):
        grow(first.router, first.experts, 1)
        grow(second.router, second.experts, 2)


def test_what_is_wrapped_around_the_router_follows() -> None:
    made = layer()
    wide = WideningRouter(made.router, torch.full((3,), 0.5), 9)
    with torch.no_grad():
        before = made.experts(tokens(), wide(tokens(), Condition()), Condition())
        grow(wide, made.experts, 2)
        assert wide.num_experts == made.experts.num_experts and wide.grid == made.router.grid
        assert torch.equal(made.experts(tokens(), wide(tokens(), Condition()), Condition()), before)


def test_a_composed_model_grows_at_its_sites_and_is_saved(tmp_path: Path) -> None:
    backbone = tiny_backbone("llama").eval()
    options = {"num_experts": (8, 8), "heads": 2, "top_k": 4, "dim_key": 8, "sites": "all"}
    model = mw.compose("peer", backbone=backbone, **options)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        site = next(iter(model.layers))
        assert model.grow(2, site=site, source="news") == {site: range(64, 80)}
        assert torch.equal(model(input_ids=ids).logits, before)
        model.grow(1)
        assert torch.equal(model(input_ids=ids).logits, before)
        model.freeze_present()
        model.save_pretrained(tmp_path / "waiting")
        again = mw.load(tmp_path / "waiting", backbone=tiny_backbone("llama").eval())
        assert torch.equal(again(input_ids=ids).logits, before)
        assert again.origins([63, 64])[site][1].source == "news"
        for each in (model, again):
            each.reserve_slots(2)
            assert torch.equal(each(input_ids=ids).logits, before)
        again.layers[site][0].extra_gate.fill_(1.0)
        after = again(input_ids=ids).logits
        assert not torch.equal(after, before)
        again.save_pretrained(tmp_path / "slots")
        third = mw.load(tmp_path / "slots", backbone=tiny_backbone("llama").eval())
        assert torch.equal(third(input_ids=ids).logits, after)
    with pytest.raises(ValueError, match="no site 'nowhere'; there are"):
        model.grow(1, site="nowhere")


def test_the_layer_has_the_verbs() -> None:
    made = layer()
    assert made.grow(1, source="x") == {"layer": range(143, 154)}
    made.freeze_present()
    made.admit(0.5)
    made.admit()
    assert made.origins([143])["layer"][0].source == "x"
    with torch.no_grad():
        trace = made.explain(tokens(400))["layer"]
        torch.testing.assert_close(trace.outputs.view(2, 400, D), made(tokens(400)), rtol=1e-5, atol=1e-5)
        gone = trace.ids.unique()[:9]
        made.ablate(gone)
        assert not torch.isin(made.explain(tokens(400))["layer"].ids, gone).any()
        made.unablate()
        made.widen_unsure({"layer": torch.full((3,), 0.5)}, 9)
        assert "heads=3" in repr(made)
        assert made(tokens(400)).shape == (2, 400, D)
        made.retrieve_plainly()
        torch.testing.assert_close(made.explain(tokens(400))["layer"].outputs, trace.outputs)


def test_what_can_not_grow_says_so() -> None:
    made = layer()
    for arguments, words in (
        ((made.router, made.experts, 0), "sub_keys=0"),
        ((ConstantRouter(torch.ones(3)), made.experts, 1), "ConstantRouter does not retrieve by product keys"),
    ):
        with pytest.raises(ValueError, match=words):
            grow(*arguments)  # type: ignore[arg-type]
    apart = layer(separate_heads=True)
    with pytest.raises(ValueError, match="separate_heads"):
        grow(apart.router, apart.experts, 1)
    with pytest.raises(ValueError, match="no experts wait"):
        reserve_slots(made.router, made.experts, 1)
    grow(made.router, made.experts, 1)
    for slots in (0, 12):
        with pytest.raises(ValueError, match="expected 1 to 11"):
            reserve_slots(made.router, made.experts, slots)
    with pytest.raises(ValueError, match="progress=2"):
        admit(made.router, made.experts, 2)


def test_sparse_editing_opens_the_rows_that_new_data_uses_and_old_data_does_not() -> None:
    made = layer()
    now, before = torch.zeros(143), torch.ones(143) * 100
    now[[3, 50, 90]] = torch.tensor([10.0, 9.0, 10.0])
    before[3] = 100_000.0
    assert open_rows(made.experts, now, before, 2).tolist() == [90, 50]
    frozen = made.experts.table.frozen  # type: ignore[union-attr]
    assert int((~frozen).sum()) == 2 and not frozen[50] and not frozen[90]
    kept = made.experts.table.rows.detach().clone()  # type: ignore[union-attr]
    train(made, torch.optim.SGD(made.parameters(), lr=0.1))
    rows = made.experts.table.rows.detach()  # type: ignore[union-attr]
    assert torch.equal(rows[frozen], kept[frozen])
    for top in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            open_rows(made.experts, now, before, top)
    with pytest.raises(ValueError, match=r"used_now has shape \(5,\); expected \(143,\)"):
        open_rows(made.experts, now[:5], before, 1)


def test_a_bias_raised_by_hand_is_seen() -> None:
    made = layer()
    grow(made.router, made.experts, 2, zero_out=False)
    made.router.bias_first[:] = torch.where(made.router.bias_first == -math.inf, 50.0, 0.0)
    found = made.router(tokens(), Condition()).indices
    assert found is not None and bool((found >= 143).all())
    assert isinstance(made.experts, NeuronExperts)
    full = copy.deepcopy(made)
    full.experts.grown = None
    assert torch.equal(made(tokens()), full(tokens()))
