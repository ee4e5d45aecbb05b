"""Layers of others as ours: outputs agree, states come back bit for bit, what can't be represented is refused."""

from typing import Any

import pytest
import torch
from PEER_pytorch import PEER as TheirPEER
from torch import Tensor, nn
from torch.nn import functional

from mixwright.methods.peer.layer import PEER

D, N, H, K, HALF = 12, 5, 3, 4, 3


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def x() -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"non_competing_scores": False},
        {"non_competing_scores": False, "product_key_topk": 2},
        {"non_competing_scores": False, "product_key_topk": 5},
        {"product_key_topk": 1},
        {"separate_embed_per_head": True},
        {"separate_embed_per_head": True, "non_competing_scores": False},
        {"pre_rmsnorm": True, "dropout": 0.3, "activation": nn.SiLU},
        {"activation": nn.ReLU, "dim_key": 5},
        {"heads": 1},
    ],
    ids=str,
)
def test_peer_pytorch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theirs = TheirPEER(D, **{"heads": H, "num_experts": N * N, "num_experts_per_head": K, **options}).eval()
    if "pre_rmsnorm" in options:
        nn.init.normal_(theirs.norm.gamma, std=0.3)
    ours = PEER.from_peer_pytorch(theirs).eval()
    expected, given = theirs(x()), x().requires_grad_()
    scale = expected.abs().max()
    out = ours(given)
    assert (out - expected).abs().max() <= 1e-6 * scale
    with torch.no_grad():
        assert (ours(x()) - expected).abs().max() <= 1e-6 * scale
    same(dict(theirs.state_dict()), ours.to_peer_pytorch())
    assert ours.experts.dropout == options.get("dropout", 0.0)
    # gradients of the tables and of the input
    there = x().requires_grad_()
    theirs(there).square().sum().backward()
    out.square().sum().backward()
    rows = torch.stack([theirs.weight_down_embed.weight.grad, theirs.weight_up_embed.weight.grad], 1)
    torch.testing.assert_close(ours.experts.table.rows.grad, rows, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))
    torch.testing.assert_close(given.grad, there.grad, rtol=1e-4, atol=1e-5 * float(there.grad.abs().max()))


def test_peer_pytorchs_state_dict_loads_with_its_defaults() -> None:
    torch.manual_seed(0)
    theirs = TheirPEER(D, heads=H, num_experts=N * N, product_key_topk=1).eval()
    torch.testing.assert_close(PEER.from_peer_pytorch(theirs.state_dict())(x()), theirs(x()), rtol=1e-5, atol=1e-5)
    paper = TheirPEER(D, heads=H, num_experts=N * N, num_experts_per_head=K, non_competing_scores=False).eval()
    ours = PEER.from_peer_pytorch(paper.state_dict(), top_k=K, gate="softmax")
    torch.testing.assert_close(ours(x()), paper(x()), rtol=1e-5, atol=1e-5)
    half = PEER.from_peer_pytorch({name: t.bfloat16() for name, t in theirs.state_dict().items()})
    assert half.experts.table.rows.dtype == torch.bfloat16  # type: ignore[union-attr]


def test_peer_pytorch_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ValueError, match="activation Tanh is not ours; accepted are nn.GELU"):
        PEER.from_peer_pytorch(TheirPEER(D, heads=H, num_experts=N * N, activation=nn.Tanh))
    with pytest.raises(TypeError, match="Linear is no PEER of PEER-pytorch, which has activation"):
        PEER.from_peer_pytorch(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="keys is missing from the state dict, which holds weight"):
        PEER.from_peer_pytorch(nn.Linear(2, 2).state_dict())


def xlm_state(*, batch_norm: bool = True, shared: bool = False, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    at, width = "query_proj.query_mlps", H * 2 * HALF
    state = {
        "keys": normal(N, HALF) if shared else normal(H, 2, N, HALF),
        "values.weight": normal(N * N, D),
        f"{at}.0.weight": normal(width, D),
        f"{at}.0.bias": normal(width),
    }
    if batch_norm:
        state |= {
            f"{at}.1.weight": normal(width),
            f"{at}.1.bias": normal(width),
            f"{at}.1.running_mean": normal(width),
            f"{at}.1.running_var": normal(width).abs() + 0.1,
            f"{at}.1.num_batches_tracked": torch.tensor(17),
        }
    return state


def retrieved(state: dict[str, Tensor], keys: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Scores under softmax and ids, `(tokens, heads * k)`, as XLM's and Meta's code computes them."""
    at = "query_proj.query_mlps"
    query = functional.linear(given, state[f"{at}.0.weight"], state.get(f"{at}.0.bias"))
    if f"{at}.1.weight" in state:
        mean, var = state[f"{at}.1.running_mean"], state[f"{at}.1.running_var"]
        query = functional.batch_norm(query, mean, var, state[f"{at}.1.weight"], state[f"{at}.1.bias"])
    query = query.view(-1, H, 2, HALF)
    one = torch.einsum("thd,hnd->thn", query[:, :, 0], keys[:, 0]).topk(K, -1)
    two = torch.einsum("thd,hnd->thn", query[:, :, 1], keys[:, 1]).topk(K, -1)
    scores = (one.values[..., :, None] + two.values[..., None, :]).flatten(-2)
    ids = (one.indices[..., :, None] * N + two.indices[..., None, :]).flatten(-2)
    best = scores.topk(K, -1)
    return best.values.softmax(-1).flatten(1), ids.gather(-1, best.indices).flatten(1)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_xlm(batch_norm: bool, shared: bool) -> None:
    state = xlm_state(batch_norm=batch_norm, shared=shared)
    keys = state["keys"].expand(H, 2, N, HALF)
    ours = PEER.from_xlm(state, top_k=K).eval()
    weights, ids = retrieved(state, keys, x().view(-1, D))
    expected = functional.embedding_bag(ids, state["values.weight"], per_sample_weights=weights, mode="sum")
    torch.testing.assert_close(ours(x()).view(-1, D), expected, rtol=1e-5, atol=1e-5)
    same(state, ours.to_xlm())
    if shared:
        with torch.no_grad():
            ours.router.keys_second.add_(1.0)
        with pytest.raises(ValueError, match="both halves have the same"):
            ours.to_xlm()


def test_xlms_notebook_names_its_query_network_otherwise() -> None:
    state = xlm_state()
    short = {name.replace("query_proj.query_mlps", "query_proj"): tensor for name, tensor in state.items()}
    same(PEER.from_xlm(short, top_k=K).to_xlm(), state)


def meta_state(*, peer: bool = False, gate: bool = True) -> dict[str, Tensor]:
    state = xlm_state(batch_norm=False, seed=3)
    state["keys"] = state["keys"].flatten(0, 2)
    draw = torch.Generator().manual_seed(4)
    if peer:
        values = state.pop("values.weight")
        return state | {"values_u.weight": values, "values_v.weight": torch.randn(N * N, D, generator=draw)}
    for name in ("value_proj", "swilu_projection") if gate else ():
        state[f"{name}.weight"] = torch.randn(D, D, generator=draw)
        state[f"{name}.bias"] = torch.randn(D, generator=draw)
    return state


@pytest.mark.parametrize("gate", [True, False])
def test_meta_memory(gate: bool) -> None:
    state = meta_state(gate=gate)
    ours, given = PEER.from_meta(state, top_k=K).eval(), x().view(-1, D)
    weights, ids = retrieved(state, state["keys"].view(H, 2, N, HALF), given)
    expected = functional.embedding_bag(ids, state["values.weight"], per_sample_weights=weights, mode="sum")
    if gate:
        swilu = functional.linear(given, state["swilu_projection.weight"], state["swilu_projection.bias"])
        gated = expected * functional.silu(swilu)
        expected = functional.linear(gated, state["value_proj.weight"], state["value_proj.bias"])
    torch.testing.assert_close(ours(x()).view(-1, D), expected, rtol=1e-4, atol=1e-4)
    same(state, ours.to_meta())


def test_metas_peer_variant() -> None:
    state = meta_state(peer=True)
    ours, given = PEER.from_meta(state, top_k=K).eval(), x().view(-1, D)
    weights, ids = retrieved(state, state["keys"].view(H, 2, N, HALF), given)
    hidden = functional.gelu(torch.einsum("td,tkd->tk", given, state["values_u.weight"][ids])) * weights
    expected = torch.einsum("tk,tkd->td", hidden, state["values_v.weight"][ids])
    torch.testing.assert_close(ours(x()).view(-1, D), expected, rtol=1e-5, atol=1e-5)
    same(state, ours.to_meta())
    unused = meta_state() | state
    del unused["values.weight"]
    same(PEER.from_meta(unused, top_k=K).to_meta(), state)


def test_what_others_can_not_be_is_refused() -> None:
    def made(grid: tuple[int, int] = (4, 4), **options: Any) -> PEER:
        return PEER(D, grid, **{"heads": 2, "top_k": 2, "dim_key": 4, "query_norm": "none", **options})

    for layer, way, words in (
        (made(), "peer_pytorch", "sub-keys for each head, and these are shared"),
        (made((4, 5), share_keys=False), "peer_pytorch", "square grids, and this one is 4 x 5"),
        (made(gated=True, share_keys=False), "peer_pytorch", "experts of 2 rows, and these have 3"),
        (made(share_keys=False, query_norm="batch"), "peer_pytorch", "router.norm.weight: PEER-pytorch has nothing"),
        (made(), "xlm", "experts of 1 rows, and these have 2"),
        (made(values_only=True, query_norm="layer"), "xlm", "knows batch norm, and no other"),
        (made(values_only=True, key_norm="rms"), "xlm", "router.norm_first.weight"),
        (made(values_only=True), "meta", "these are shared"),
        (made(row_dim=3), "meta", "project_in"),
    ):
        with pytest.raises(ValueError, match=words):
            getattr(layer, f"to_{way}")()
    held = made(share_keys=False)
    held.router.bias_first[0, 1] = 1.0
    with pytest.raises(ValueError, match="router.bias_first"):
        held.to_peer_pytorch()
    with pytest.raises(ValueError, match="mem_gated"):
        PEER.from_meta(meta_state() | {"gating.weight": torch.zeros(1, D)})
    with pytest.raises(ValueError, match="several layers"):
        PEER.from_xlm(xlm_state() | {"query_proj.query_mlps.2.weight": torch.zeros(1)})
