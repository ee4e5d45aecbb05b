"""Slots of a hybrid against stub components: the equations of the gate, who runs, and what a lone component meets."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mixwright.experts.blocks import BlockExperts, EmbeddingExperts, HeadExperts, acting
from mixwright.experts.projectors import make_projector, resized
from mixwright.routing import Condition, Routing

WIDTHS, VOCAB, B, T = (6, 4, 5), 11, 2, 7
D, M = max(WIDTHS), len(WIDTHS)


class Stub:
    """Components whose part of each slot is a matrix and a tanh; counts who ran."""

    def __init__(self, dtypes: tuple[torch.dtype, ...] = (torch.float64,) * M) -> None:
        draw = torch.Generator().manual_seed(0)

        def made(*shape: int) -> list[Tensor]:
            rows = [torch.randn(*shape, d, generator=draw, dtype=torch.float64) for d in WIDTHS]
            return [row.to(dtype) for row, dtype in zip(rows, dtypes)]

        self.dtypes = dtypes
        self.embedded = made(B, T)
        self.layers = [torch.randn(d, d, generator=draw, dtype=torch.float64).to(t) for d, t in zip(WIDTHS, dtypes)]
        self.heads = [torch.randn(d, VOCAB, generator=draw, dtype=torch.float64).to(t) for d, t in zip(WIDTHS, dtypes)]
        self.ran: list[int] = []

    def embed(self, m: int, _: Tensor | None) -> Tensor:
        self.ran.append(m)
        return self.embedded[m]

    def block(self, m: int, x: Tensor | None) -> Tensor:
        assert x is not None and x.shape[-1] == WIDTHS[m]
        self.ran.append(m)
        return torch.tanh(x.to(self.dtypes[m]) @ self.layers[m])

    def head(self, m: int, x: Tensor | None) -> Tensor:
        assert x is not None
        self.ran.append(m)
        return x.to(self.dtypes[m]) @ self.heads[m]


def blocks(stub: Stub, kind: str = "linear") -> BlockExperts:
    torch.manual_seed(1)
    return BlockExperts(stub.block, WIDTHS, kind).double()  # type: ignore[arg-type]


def stream(width: int = D) -> Tensor:
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


SHAPES: dict[str, tuple[int, ...]] = {"static": (), "sequence": (B, 1), "token": (B, T)}


def simplex(shape: tuple[int, ...] = (), models: int = M) -> Tensor:
    return torch.rand(*shape, models, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log().softmax(-1)


every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def written_out(experts: BlockExperts, stub: Stub, h: Tensor, alpha: Tensor) -> Tensor:
    """Equations 1 to 4 of a hybrid block, one component after the other."""
    out = torch.zeros(B, T, D, dtype=torch.float64)
    for m, width in enumerate(WIDTHS):
        a = alpha[..., m : m + 1]
        x = (1 - a) * experts.enter[m](h) + a * h[..., :width]
        y = stub.block(m, x)
        z = (1 - a) * experts.leave[m](y) + a * nn.functional.pad(y, (0, D - width))
        out = out + a * z
    return out


@every_shape
@pytest.mark.parametrize("kind", ["linear", "identity", "least_squares", "mlp"])
def test_a_block_is_its_equations(kind: str, shape: tuple[int, ...]) -> None:
    stub, alpha = Stub(), simplex(shape)
    experts = blocks(stub, kind)
    found = experts(stream(), Routing(alpha, M), Condition())
    torch.testing.assert_close(found, written_out(experts, stub, stream(), alpha), atol=1e-12, rtol=1e-12)


@every_shape
def test_the_embedding_and_the_head_are_plain_mixtures(shape: tuple[int, ...]) -> None:
    stub, alpha = Stub(), simplex(shape)
    mixed = EmbeddingExperts(stub.embed, WIDTHS)(torch.zeros(B, T, 1), Routing(alpha, M), Condition())
    padded = [nn.functional.pad(e, (0, D - e.shape[-1])) for e in stub.embedded]
    torch.testing.assert_close(mixed, sum(alpha[..., m : m + 1] * e for m, e in enumerate(padded)))
    h = stream()
    logits = HeadExperts(stub.head, WIDTHS)(h, Routing(alpha, M), Condition())
    expected = sum(alpha[..., m : m + 1] * (h[..., :d] @ stub.heads[m]) for m, d in enumerate(WIDTHS))
    torch.testing.assert_close(logits, expected)


@every_shape
@pytest.mark.parametrize("kind", ["linear", "none", "mlp"])
def test_the_gradient_of_the_weights_has_every_term_of_the_gate(kind: str, shape: tuple[int, ...]) -> None:
    stub = Stub()
    experts, embed, head = blocks(stub, kind), EmbeddingExperts(stub.embed, WIDTHS), HeadExperts(stub.head, WIDTHS)

    def loss(alpha: Tensor) -> Tensor:
        routing = Routing(alpha, M)
        h = embed(torch.zeros(B, T, 1), routing, Condition())
        return head(experts(h, routing, Condition()), routing, Condition()).logsumexp(-1).mean()

    assert torch.autograd.gradcheck(loss, (simplex(shape).requires_grad_(),), eps=1e-6, atol=1e-8)


def test_leaving_out_a_term_of_the_gate_would_be_noticed() -> None:
    stub, alpha = Stub(), simplex().requires_grad_()
    experts = blocks(stub)
    whole = torch.autograd.grad(experts(stream(), Routing(alpha, M), Condition()).sum(), alpha)[0]
    gates = alpha.detach()
    z = [
        torch.lerp(experts.leave[m](y), resized(y, D), gates[m])
        for m, y in ((m, stub.block(m, _entering(experts, m, gates[m]))) for m in range(M))
    ]
    assert not torch.allclose(whole, torch.stack([part.sum() for part in z]), rtol=0.05)


def _entering(experts: BlockExperts, m: int, alpha: Tensor) -> Tensor:
    return torch.lerp(experts.enter[m](stream()), resized(stream(), WIDTHS[m]), alpha)


@pytest.mark.parametrize("m", range(M))
@pytest.mark.parametrize("form", ["dense", "one id", "per token"])
def test_a_lone_component_meets_no_projector_and_no_arithmetic(m: int, form: str) -> None:
    stub, weights = Stub(), torch.eye(M)[m]
    routing = {
        "dense": Routing(weights, M),
        "one id": Routing(torch.ones(1), M, torch.tensor([m])),
        "per token": Routing(weights.expand(B, T, M), M),
    }[form]
    experts, h = blocks(stub), stream()
    for projector in (*experts.enter, *experts.leave):
        projector.register_forward_hook(lambda *_: pytest.fail("a projector was called"))
    expected = Stub().block(m, h[..., : WIDTHS[m]])
    assert torch.equal(experts(h, routing, Condition()), expected)
    assert EmbeddingExperts(stub.embed, WIDTHS)(h, routing, Condition()) is stub.embedded[m]
    assert torch.equal(HeadExperts(stub.head, WIDTHS)(expected, routing, Condition()), Stub().head(m, expected))
    assert stub.ran == [m, m, m]


def test_who_has_no_weight_does_not_run() -> None:
    stub = Stub()
    experts = blocks(stub)
    experts(stream(), Routing(torch.tensor([0.4, 0.0, 0.6], dtype=torch.float64), M), Condition())
    experts(stream(), Routing(torch.tensor([0.4, 0.6]), M, torch.tensor([2, 0])), Condition())
    experts(stream(), Routing(torch.tensor([[[0.5, 0.0, 0.5]], [[1.0, 0.0, 0.0]]]), M), Condition())
    assert stub.ran == [0, 2, 2, 0, 0, 2]
    with pytest.raises(ValueError, match="none of them any weight"):
        acting(Routing(torch.zeros(M), M))


def test_ids_that_differ_between_tokens_are_read() -> None:
    indices = torch.tensor([[[0], [1]], [[1], [1]]])
    members = acting(Routing(torch.ones(2, 2, 1), M, indices))
    assert [m for m, _ in members] == [0, 1]
    assert members[1][1] is not None and members[1][1].flatten().tolist() == [0.0, 1.0, 1.0, 1.0]


def test_what_was_read_of_a_routing_is_read_again_when_it_changes() -> None:
    stub, weights = Stub(), torch.tensor([1.0, 0.0, 0.0])
    experts, routing = blocks(stub), Routing(weights, M)
    experts(stream(), routing, Condition())
    weights.copy_(torch.tensor([0.0, 1.0, 0.0]))
    experts(stream(), routing, Condition())
    experts(stream(), Routing(torch.tensor([0.0, 0.0, 1.0]), M), Condition())
    assert stub.ran == [0, 1, 2]


def test_a_stream_of_a_lone_component_is_widened_for_the_next_block() -> None:
    stub, alpha = Stub(), simplex()
    experts = blocks(stub)
    narrow = stream(WIDTHS[1])
    wide = nn.functional.pad(narrow, (0, D - WIDTHS[1]))
    found, expected = (experts(h, Routing(alpha, M), Condition()) for h in (narrow, wide))
    assert torch.equal(found, expected)


def test_a_component_that_keeps_the_last_tokens_only_is_mixed_by_their_weights() -> None:
    stub, alpha = Stub(), simplex((B, T))
    whole = blocks(stub)(stream(), Routing(alpha, M), Condition())
    short = BlockExperts(lambda m, x: stub.block(m, x)[:, -2:], WIDTHS)
    short.load_state_dict(blocks(stub).state_dict())
    found = short.double()(stream(), Routing(alpha, M), Condition())
    torch.testing.assert_close(found, whole[:, -2:], atol=1e-14, rtol=0)


@pytest.mark.parametrize("shape", [(), (B, T)], ids=["static", "token"])
def test_identity_projectors_between_equal_widths_are_no_ops(shape: tuple[int, ...]) -> None:
    experts = BlockExperts(lambda m, x: x * (m + 1.0), (D, D), "identity")  # type: ignore[operator]
    bare = BlockExperts(lambda m, x: x * (m + 1.0), (D, D), "none")  # type: ignore[operator]
    for _ in range(3):
        routing = Routing(simplex(shape, 2).float(), 2)
        h = stream().float()
        torch.testing.assert_close(experts(h, routing, Condition()), bare(h, routing, Condition()), atol=0, rtol=0)


def test_identity_projectors_pad_and_truncate() -> None:
    for d_in, d_out in ((3, 5), (5, 3), (4, 4)):
        projector, x = make_projector("identity", d_in, d_out), torch.randn(2, d_in)
        assert projector is not None and torch.equal(projector(x), resized(x, d_out))


def test_components_of_different_dtypes_meet_in_the_widest() -> None:
    stub = Stub((torch.float32, torch.bfloat16, torch.float32))
    experts = BlockExperts(stub.block, WIDTHS)
    alpha = simplex().float()
    out = experts(stream().float(), Routing(alpha, M), Condition())
    assert out.dtype == torch.float32
    exact = written_out(copy.deepcopy(experts).double(), Stub(), stream(), alpha.double())
    torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.05)
    low = Stub((torch.bfloat16,) * M)
    out = BlockExperts(low.block, WIDTHS)(stream().bfloat16(), Routing(alpha, M), Condition())
    assert out.dtype == torch.bfloat16
    assert EmbeddingExperts(low.embed, WIDTHS)(out, Routing(alpha, M), Condition()).dtype == torch.bfloat16


def test_narrow_streams_are_mixed_in_float32() -> None:
    parts = [stream().bfloat16() * (m + 1) for m in range(3)]
    weights = torch.tensor([0.731, 0.1234, 0.1456])
    found = EmbeddingExperts(lambda m, _: parts[m], (D,) * 3)(stream(), Routing(weights, 3), Condition())
    exact = sum(w.double() * part.double() for w, part in zip(weights, parts))
    narrow = sum(w * part for w, part in zip(weights.bfloat16(), parts))
    assert torch.equal(found, exact.bfloat16()) and not torch.equal(found, narrow)  # type: ignore[union-attr,arg-type]


def test_permuting_components_permutes_the_weights_and_leaves_the_logits() -> None:
    order, stub, alpha = [2, 0, 1], Stub(), simplex()
    widths = [WIDTHS[m] for m in order]
    experts = blocks(stub)
    other = BlockExperts(lambda m, x: stub.block(order[m], x), widths).double()
    for here, there in ((experts.enter, other.enter), (experts.leave, other.leave)):
        for place, m in enumerate(order):
            there[place].load_state_dict(here[m].state_dict())
    found = HeadExperts(lambda m, x: stub.head(order[m], x), widths)(
        other(stream(), Routing(alpha[order], M), Condition()), Routing(alpha[order], M), Condition()
    )
    expected = HeadExperts(stub.head, WIDTHS)(
        experts(stream(), Routing(alpha, M), Condition()), Routing(alpha, M), Condition()
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
