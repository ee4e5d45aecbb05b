"""Revival of dead sub-keys: nothing changes until they are admitted, and then they are used."""

import pytest
import torch
from torch import Tensor, nn

from mixwright.evaluation.neuron_usage import SiteUsage, usage
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.revival import Admission, Revived, revive
from mixwright.routing import Condition


def layer(*, share_keys: bool = True, gated: bool = False, row_dim: int | None = None) -> PEER:
    """Some sub-keys point where no query goes."""
    torch.manual_seed(0)
    peer = PEER(
        16,
        (12, 12),
        heads=2,
        top_k=4,
        dim_key=16,
        query_norm="none",
        share_keys=share_keys,
        gated=gated,
        row_dim=row_dim,
    )
    with torch.no_grad():
        for keys in (peer.router.keys_first, peer.router.keys_second):
            keys[:, -3:] *= 1e-3
        peer.router.bias_first[:, -3:] = peer.router.bias_second[:, -3:] = -5
    return peer.eval()


def stream() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 32, 16, generator=generator) for _ in range(3)]


def counted(model: nn.Module) -> dict[str, SiteUsage]:
    with usage(model) as meter:
        for x in stream():
            model(x)
    return dict(meter.usage())


@pytest.mark.parametrize("share_keys", [True, False])
@pytest.mark.parametrize(("gated", "row_dim"), [(False, None), (True, 8)])
def test_revival_is_neutral_to_the_bit_and_admission_is_not(share_keys: bool, gated: bool, row_dim: int | None) -> None:
    peer = layer(share_keys=share_keys, gated=gated, row_dim=row_dim)
    used = counted(peer)
    before = [peer(x) for x in stream()]
    rows = peer.experts.table.rows.detach().clone()
    found = revive(peer, stream(), used)
    assert found.count() >= (5 if share_keys else 10)
    assert all(torch.equal(peer(x), y) for x, y in zip(stream(), before, strict=True))
    ids = found.rows["layer"]
    assert len(ids) and not rows[ids, -1].eq(0).all()
    assert not peer.experts.table.rows[ids, -1].any(), "they say nothing yet"
    assert not torch.equal(peer.experts.table.rows[ids, 0], rows[ids, 0])
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[ids] = False
    assert torch.equal(peer.experts.table.rows[kept], rows[kept])
    admission = Admission(peer, found, steps=4)
    assert [admission.step() for _ in range(4)] == [False, False, False, True]
    assert peer.router.bias_first.isfinite().all() and peer.router.bias_second.isfinite().all()
    after = counted(peer)["layer"]
    assert float(after.first.dead.mean()) < float(used["layer"].first.dead.mean())
    assert float(after.second.dead.mean()) < float(used["layer"].second.dead.mean())
    assert not all(torch.equal(peer(x), y) for x, y in zip(stream(), before, strict=True)), "v = 0 alone is not neutral"


def test_the_first_step_of_a_long_admission_chooses_none() -> None:
    peer = layer()
    used = counted(peer)
    before = [peer(x) for x in stream()]
    admission = Admission(peer, revive(peer, stream(), used), steps=10_000)
    admission.step()
    assert peer.router.bias_first.isfinite().all()
    assert all(torch.equal(peer(x), y) for x, y in zip(stream(), before, strict=True))


def test_keys_go_to_poorly_covered_queries_and_rows_to_inputs_with_high_losses() -> None:
    peer = layer()
    used, data = counted(peer), stream()
    losses = [torch.zeros(4, 32) for _ in data]
    losses[1][2, 5:9] = torch.tensor([3.0, 4.0, 5.0, 6.0])
    found = revive(peer, data, used, losses=losses)
    router = peer.router
    retrieved = router.retrieve(torch.cat(data), Condition(), detail=True)
    assert retrieved.coverage is not None
    poor = retrieved.coverage < retrieved.coverage.flatten().quantile(0.25)
    queries = router.asked(torch.cat(data), Condition())[poor][:, 0]
    keys = router.keys_first[0, -3:-1]
    near = nn.functional.cosine_similarity(keys[:, None], queries[None], dim=-1).amax(-1)
    assert (near > 0.5).all(), "each has queries around it"
    live = router.keys_first[0, :-3].norm(dim=-1).mean()
    assert (keys.norm(dim=-1) > 0.5 * live).all()
    rows = peer.experts.table.rows[found.rows["layer"], 0]
    direction = nn.functional.cosine_similarity(rows[:, None], data[1][2, 5:9][None], dim=-1).amax(-1)
    assert float((direction > 0.999).float().mean()) > 0.04, "the four worst tokens are among them"


def test_a_table_that_two_layers_share_keeps_what_one_of_them_reads() -> None:
    first, second = layer(), layer()
    with torch.no_grad():
        second.router.bias_first.zero_()
        second.router.bias_second.zero_()
        second.router.keys_first.copy_(torch.randn_like(second.router.keys_first))
    second.experts.table = first.experts.table
    both = nn.Sequential(first, second).eval()
    used = counted(both)
    before = [both(x) for x in stream()]
    found = revive(both, stream(), used)
    assert found.count() > 0
    assert all(torch.equal(both(x), y) for x, y in zip(stream(), before, strict=True))
    assert not (used["1"].counts[found.rows["0"]] > 0).any()


def test_frozen_rows_and_keys_kept_out_are_left_alone() -> None:
    peer = layer()
    peer.router.bias_first[:, -1] = -torch.inf
    peer.experts.table.frozen = torch.ones(144, dtype=torch.bool)
    key, rows = peer.router.keys_first[:, -1].clone(), peer.experts.table.rows.clone()
    found = revive(peer, stream(), counted(peer))
    assert torch.equal(peer.router.keys_first[:, -1], key) and torch.equal(peer.experts.table.rows, rows)
    assert all(int(k) != 11 for one in found.keys if one.axis == "first" for k in one.keys[:, 1])


def test_a_layer_without_dead_keys_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    peer = PEER(16, (3, 3), heads=2, top_k=4, dim_key=16, query_norm="none").eval()
    state = {name: t.clone() for name, t in peer.state_dict().items()}
    found = revive(peer, stream(), counted(peer))
    assert found == Revived() and found.count() == 0
    assert all(torch.equal(t, state[name]) for name, t in peer.state_dict().items())


def test_losses_must_fit_the_data() -> None:
    peer = layer()
    with pytest.raises(ValueError, match="one loss for each token"):
        revive(peer, stream(), counted(peer), losses=[torch.zeros(3)])
    with pytest.raises(ValueError, match="steps=0"):
        Admission(peer, Revived(), 0)
