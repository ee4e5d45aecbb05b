"""Arguments of single-neuron experts, their results by any path, and whether they agree."""

import torch

NAMES = ("x", "rows", "weights", "bias")


def case(*, tokens=9, width=24, parts=2, experts=40, k=6, bias=False, dtype=torch.float64, seed=0):
    """Arguments with duplicates in a token's list, weights of zero, and experts that nobody retrieves."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=make, dtype=torch.float64)
    rows = torch.randn(experts, parts, width, generator=make, dtype=torch.float64) * width**-0.5
    indices = torch.randint(experts - 3, (tokens, k), generator=make)
    weights = torch.rand(tokens, k, generator=make, dtype=torch.float64)
    if tokens and k > 3:
        indices[:, 1] = indices[:, 0]
        weights[:, 3] = 0
    offsets = torch.randn(experts, parts - 1, generator=make, dtype=torch.float64) if bias else None
    x, rows, weights, offsets = (
        None if t is None else t.to(dtype).requires_grad_() for t in (x, rows, weights, offsets)
    )
    return x, rows, weights, indices, offsets


def both(function, x, rows, weights, indices, bias, activation="gelu", dtype=torch.float64, **how):
    """The output and the gradients of everything, made dense."""
    given = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, rows, weights, bias)]
    out = function(given[0], given[1], given[2], indices, activation, given[3], **how)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [t for t in given if t is not None]
    found = torch.autograd.grad(out, wanted, seed, allow_unused=True)
    dense = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]
    return [out.detach(), *(g.to_dense() if g.is_sparse else g for g in dense)]


def agree(found, expected, rtol):
    for name, one, other in zip(("out", *NAMES), found, expected):
        atol = rtol * max(float(other.abs().max()), 1e-30) if other.numel() else 0.0
        difference = float((one.double() - other.double()).abs().max()) if other.numel() else 0.0
        assert one.shape == other.shape and difference <= atol, f"{name}: {difference} > {atol}"
