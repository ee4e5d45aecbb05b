"""The cases of `test_triton.py`, run by Triton's interpreter in a process of its own: triton asks for it on import.

TRITON_INTERPRET=1 python tests/ops/triton_cases.py
"""

import torch

from mixwright.ops import gpu, neuron
from mixwright.ops import route as routed
from mixwright.ops.neuron_gradients import combine
from mixwright.ops.neuron_reference import ACTIVATIONS, neurons_reference
from mixwright.ops.product_key import product_key_top_k_reference
from mixwright.ops.route import Routed
from mixwright.ops.selected_scores import selected_scores_reference
from mixwright.ops.triton.neuron import TritonPasses
from mixwright.ops.triton.route import best_keys


def neurons(tokens, experts, parts, width, k, activation, *, biased, dtype=torch.float32, gradient="dense", programs=1):
    """Values and all gradients against the reference in float64; twice the same to the bit."""
    make = torch.Generator().manual_seed(tokens + width + k)
    x = torch.randn(tokens, width, generator=make)
    rows = torch.randn(experts, parts, width, generator=make) * width**-0.5
    indices = torch.randint(experts, (tokens, k), generator=make)
    indices[:, : k // 2] = experts // 2  # a row with many pairs
    weights = torch.randn(tokens, k, generator=make)
    weights[:, 0] = 0
    bias = torch.randn(experts, parts - 1, generator=make) if biased else None
    seed = torch.randn(tokens, width, generator=make)
    given = [t if t is None else t.to(dtype).requires_grad_() for t in (x, rows, weights, bias)]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in given]
    passes, found = TritonPasses(programs), []
    for _ in range(2):
        out = combine(passes, *given[:3], indices, activation, given[3], gradient)
        found.append((out, *torch.autograd.grad(out, [t for t in given if t is not None], seed.to(dtype))))
    assert all(torch.equal(_dense(one), _dense(other)) for one, other in zip(*found))
    expected = neurons_reference(*wide[:3], indices, activation, wide[3])
    inputs = [t for t in wide if t is not None]
    gradients = torch.autograd.grad(expected, inputs, seed.double(), allow_unused=True)
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for mine, theirs in zip(found[0], (expected, *gradients), strict=True):
        theirs = torch.zeros_like(_dense(mine)).double() if theirs is None else theirs
        assert mine.dtype == dtype
        scale = max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(_dense(mine).double(), theirs, atol=tolerance * scale, rtol=tolerance)


def _dense(tensor):
    return tensor.to_dense() if tensor.is_sparse else tensor


def routes(tokens, heads, key_heads, n1, n2, half, k, *, family="normal", biased=False):
    """Ids and scores as a stable sort of all sums has them, and the sums over all experts."""
    make = torch.Generator().manual_seed(tokens + n1)

    def draw(*shape):
        drawn = torch.randn(shape, generator=make)
        return drawn.round() if family == "few" else drawn

    queries, first, second = draw(tokens, heads, 2, half), draw(key_heads, n1, half), draw(key_heads, n2, half)
    biases = [draw(key_heads, n) if biased else None for n in (n1, n2)]
    if biased:
        biases[0][:, n1 // 2 :] = -torch.inf
    one, two = (
        torch.einsum("thd,hnd->thn", queries[:, :, side], keys.expand(heads, -1, -1))
        for side, keys in enumerate((first, second))
    )
    found = Routed(*best_keys(queries, first, second, k, *biases))
    expected = product_key_top_k_reference(one, two, k, *biases)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    same = found.indices == expected.indices
    finite = expected.scores > -torch.inf
    assert same[finite].all() if family == "few" else same[finite].float().mean() > 0.99
    assert found.indices.min() >= 0 and found.indices.max() < n1 * n2
    one = one if biases[0] is None else one.masked_fill(biases[0] == -torch.inf, -torch.inf)
    sums = (one[..., :, None] + two[..., None, :]).flatten(-2).double()
    torch.testing.assert_close(found.log_partition.double(), sums.logsumexp(-1), atol=1e-4, rtol=1e-4)
    entropies = torch.special.entr(sums.softmax(-1)).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropies, atol=1e-4, rtol=1e-4)


def chosen():
    """`combine_neurons` and `route` go by Triton where a tensor is for it, gradients included."""
    gpu.on_gpu = lambda tensor: True
    neuron.PlainPasses = routed._plane = routed._few = None
    make = torch.Generator().manual_seed(0)
    x, rows = torch.randn(3, 8, generator=make), torch.randn(20, 2, 8, generator=make)
    weights, indices = torch.rand(3, 4, generator=make), torch.randint(20, (3, 4), generator=make)
    found = neuron.combine_neurons(x, rows, weights, indices, "gelu")
    torch.testing.assert_close(found, neurons_reference(x, rows, weights, indices, "gelu"))
    tensors = [torch.randn(s, generator=make).requires_grad_() for s in ((3, 2, 2, 8), (2, 9, 8), (2, 7, 8))]
    found = routed.route(*tensors, 4)
    expected = selected_scores_reference(*tensors, found.indices)
    torch.testing.assert_close(found.scores, expected)
    both = [torch.autograd.grad(y.square().sum(), tensors) for y in (found.scores, expected)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other)


def main() -> None:
    for number, activation in enumerate(ACTIVATIONS):
        neurons(3, 7, 2 + number % 2, 7, 5, activation, biased=number % 2 == 0)
    neurons(4, 9, 1, 33, 6, "gelu", biased=False)
    neurons(40, 9, 3, 12, 6, "silu", biased=True)  # more than 64 pairs of one row
    neurons(40, 9, 2, 1, 6, "relu", biased=False, gradient="compact")
    neurons(2, 50, 2, 96, 17, "gelu", biased=True, gradient="auto", programs=8)  # a token's pairs in parts
    neurons(5, 9, 3, 20, 6, "gelu_tanh", biased=True, dtype=torch.bfloat16)
    routes(5, 2, 2, 33, 20, 7, 16)
    routes(5, 3, 1, 70, 9, 20, 5, family="few")
    routes(3, 2, 2, 12, 10, 16, 9, biased=True)
    routes(2, 1, 1, 3, 4, 16, 12)
    chosen()
    print("as the references have it")


if __name__ == "__main__":
    main()
