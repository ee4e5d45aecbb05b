"""The arithmetic of single-neuron experts in Triton: rows are read once in each direction, sums are float32.

One program owns a token, or a part of its pairs where tokens are few, and in the gradient of the rows one row, or 64 of
its pairs where it has more. Nothing is added atomically, so that results don't change from run to run.
"""

# What a kernel is given and loads has no types in Python.
# pyright: basic, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def act(z, KIND: tl.constexpr):
    """gelu, gelu_tanh, relu, silu or relu_squared, by number."""
    if KIND == 0:
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    if KIND == 1:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if KIND == 2:
        return tl.maximum(z, 0.0)
    if KIND == 3:
        return z * tl.sigmoid(z)
    return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)


@triton.jit
def slope(z, KIND: tl.constexpr):
    """The derivative of `act`."""
    if KIND == 0:
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if KIND == 1:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    if KIND == 2:
        return tl.where(z > 0, 1.0, 0.0)
    if KIND == 3:
        s = tl.sigmoid(z)
        return s + z * s * (1 - s)
    return 2 * tl.maximum(z, 0.0)


@triton.jit
def forward(
    out, x, rows, bias, weights, indices, tokens, pairs, width, each,
    PARTS: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`out` `(splits, tokens, width)`: program (t, s) sums `each` of the pairs of token t."""
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    token = tl.load(x + t * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    end = tl.minimum((s + 1) * each, pairs)
    for first in range(s * each, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        w = tl.load(weights + t * pairs + slot, mask=slot < end, other=0.0).to(tl.float32)
        acts = w != 0.0
        expert = tl.load(indices + t * pairs + slot, mask=acts, other=0).to(tl.int64)
        place = rows + expert[:, None] * (PARTS * width) + columns[None, :]
        read = acts[:, None] & inside[None, :]
        v = tl.load(place + (PARTS - 1) * width, mask=read, other=0.0).to(tl.float32)
        if PARTS > 1:
            u = tl.load(place, mask=read, other=0.0).to(tl.float32)
            z = tl.sum(u * token[None, :], 1)
            if BIASED:
                z += tl.load(bias + expert * (PARTS - 1), mask=acts, other=0.0).to(tl.float32)
            if PARTS == 3:
                g = tl.load(place + width, mask=read, other=0.0).to(tl.float32)
                gate = tl.sum(g * token[None, :], 1)
                if BIASED:
                    gate += tl.load(bias + expert * 2 + 1, mask=acts, other=0.0).to(tl.float32)
                w = w * act(gate, KIND) * z
            else:
                w = w * act(z, KIND)
        total += tl.sum(w[:, None] * v, 0)
    tl.store(out + (s * tokens + t) * width + columns, total, mask=inside)


@triton.jit
def backward(
    dx, d_weights, factors, x, dy, rows, bias, weights, indices, tokens, pairs, width, each,
    PARTS: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """By tokens, as `forward`: `dx` `(splits, tokens, width)`, d_weights and what each pair adds to its rows.

    With ALL, rows of weight 0 are read too, since their weights have gradients.
    """
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    token = tl.load(x + t * width + columns, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(dy + t * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    end = tl.minimum((s + 1) * each, pairs)
    for first in range(s * each, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        here = slot < end
        w = tl.load(weights + t * pairs + slot, mask=here, other=0.0).to(tl.float32)
        acts = here & ((w != 0.0) | ALL)
        expert = tl.load(indices + t * pairs + slot, mask=acts, other=0).to(tl.int64)
        place = rows + expert[:, None] * (PARTS * width) + columns[None, :]
        read = acts[:, None] & inside[None, :]
        v = tl.load(place + (PARTS - 1) * width, mask=read, other=0.0).to(tl.float32)
        along = tl.sum(v * above[None, :], 1)
        factor = factors + (t * pairs + slot) * PARTS
        if PARTS == 1:
            hidden = tl.where(acts, 1.0, 0.0)
        else:
            u = tl.load(place, mask=read, other=0.0).to(tl.float32)
            z = tl.sum(u * token[None, :], 1)
            if BIASED:
                z += tl.load(bias + expert * (PARTS - 1), mask=acts, other=0.0).to(tl.float32)
            if PARTS == 3:
                g = tl.load(place + width, mask=read, other=0.0).to(tl.float32)
                gate = tl.sum(g * token[None, :], 1)
                if BIASED:
                    gate += tl.load(bias + expert * 2 + 1, mask=acts, other=0.0).to(tl.float32)
                hidden = act(gate, KIND) * z
                dz = w * along * act(gate, KIND)
                d_gate = w * along * z * slope(gate, KIND)
                tl.store(factor + 1, d_gate, mask=here)
                total += tl.sum(dz[:, None] * u + d_gate[:, None] * g, 0)
            else:
                hidden = act(z, KIND)
                dz = w * along * slope(z, KIND)
                total += tl.sum(dz[:, None] * u, 0)
            tl.store(factor, dz, mask=here)
        tl.store(factor + PARTS - 1, w * hidden, mask=here)
        tl.store(d_weights + t * pairs + slot, hidden * along, mask=here)
    tl.store(dx + (s * tokens + t) * width + columns, total, mask=inside)


@triton.jit
def reduce(
    to, d_bias, x, dy, factors, sorted_pairs, begins, ends, places, experts, pairs, width,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum `sorted_pairs[begins:ends]` into place `places` of `to`; one program for each such piece, blocks in order."""
    piece = tl.program_id(0)
    begin, end = tl.load(begins + piece), tl.load(ends + piece)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    into = tl.load(places + piece).to(tl.int64)
    last = tl.zeros([WIDTH], tl.float32)
    one = tl.zeros([WIDTH], tl.float32)
    two = tl.zeros([WIDTH], tl.float32)
    bias_one = tl.zeros([BLOCK], tl.float32)
    bias_two = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        here = slot < end
        pair = tl.load(sorted_pairs + slot, mask=here, other=0).to(tl.int64)
        place = (pair // pairs)[:, None] * width + columns[None, :]
        read = here[:, None] & inside[None, :]
        if ROWS:
            above = tl.load(dy + place, mask=read, other=0.0).to(tl.float32)
            factor = tl.load(factors + pair * PARTS + PARTS - 1, mask=here, other=0.0)
            last += tl.sum(factor[:, None] * above, 0)
        if PARTS > 1:
            token = tl.load(x + place, mask=read, other=0.0).to(tl.float32)
            factor = tl.load(factors + pair * PARTS, mask=here, other=0.0)
            one += tl.sum(factor[:, None] * token, 0)
            bias_one += factor
            if PARTS == 3:
                factor = tl.load(factors + pair * PARTS + 1, mask=here, other=0.0)
                two += tl.sum(factor[:, None] * token, 0)
                bias_two += factor
    if ROWS:
        row = to + into * (PARTS * width) + columns
        tl.store(row + (PARTS - 1) * width, last, mask=inside)
        if PARTS > 1:
            tl.store(row, one, mask=inside)
        if PARTS == 3:
            tl.store(row + width, two, mask=inside)
    if BIASED:
        into = d_bias + tl.load(experts + piece).to(tl.int64) * (PARTS - 1)
        tl.store(into, tl.sum(bias_one, 0))
        if PARTS == 3:
            tl.store(into + 1, tl.sum(bias_two, 0))


@triton.jit
def gather(to, pieces, begins, ends, places, size, BLOCK: tl.constexpr):
    """Sum pieces[begins:ends] in their order into place `places` of `to`: the second pass of rows with many pairs."""
    heavy = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for piece in range(tl.load(begins + heavy).to(tl.int64), tl.load(ends + heavy).to(tl.int64)):
        total += tl.load(pieces + piece * size + column, mask=inside, other=0.0)
    tl.store(to + tl.load(places + heavy).to(tl.int64) * size + column, total, mask=inside)
