"""Product-key retrieval in Triton: scores of all sub-keys stay in registers, only the best of each half are written.

A value and its place are one int64: the value's bits in order above, the place from the end below, so that sorting
them breaks ties to the lowest place.
"""

# What a kernel is given and loads has no types in Python.
# pyright: basic, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl


@triton.jit
def packed(value, place):
    """Sorted by value, then by place from the end."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - place.to(tl.int64))


@triton.jit
def value_of(pack):
    """The value of a packed pair."""
    ordered = (pack >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(pack):
    """The place of a packed pair."""
    return 0xFFFFFFFF - (pack & 0xFFFFFFFF)


@triton.jit
def best_half(
    best, sums, queries, keys, bias, tokens, heads, shared, n, half, side,
    BIASED: tl.constexpr, KEPT: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The KEPT best of `n` sub-keys for TOKENS queries of a head, packed, and log-sum-exp and entropy of them all."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    key_head = tl.where(shared, 0, head)
    query = queries + ((token * heads + head) * 2 + side) * half
    least: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    kept = tl.full([TOKENS, KEPT], least, tl.int64)
    most = tl.full([TOKENS], float("-inf"), tl.float32)
    mass = tl.zeros([TOKENS], tl.float32)
    moment = tl.zeros([TOKENS], tl.float32)
    for start in range(0, n, KEYS):
        place = start + tl.arange(0, KEYS)
        score = tl.zeros([TOKENS, KEYS], tl.float32)
        for column in range(0, HALF, CHUNK):
            columns = column + tl.arange(0, CHUNK)
            q = tl.load(
                query[:, None] + columns[None, :], mask=here[:, None] & (columns < half)[None, :], other=0.0
            ).to(tl.float32)
            c = tl.load(
                keys + (key_head * n + place)[None, :] * half + columns[:, None],
                mask=(place < n)[None, :] & (columns < half)[:, None],
                other=0.0,
            ).to(tl.float32)
            score = tl.dot(q, c, score, input_precision="ieee")
        chosen = score
        counted = (place < n)[None, :]
        if BIASED:
            extra = tl.load(bias + key_head * n + place, mask=place < n, other=0.0).to(tl.float32)
            chosen = score + extra[None, :]
            counted = counted & (extra > float("-inf"))[None, :]
        score = tl.where(counted, score, float("-inf"))
        # The largest so far is taken out of the sums; where nothing counts yet, 0 is.
        larger = tl.maximum(most, tl.max(score, 1))
        shift = tl.where(larger > float("-inf"), larger, 0.0)
        before = tl.where(most > float("-inf"), tl.exp(most - shift), 0.0)
        part = tl.exp(score - shift[:, None])
        moment = (moment + tl.where(most > float("-inf"), most - shift, 0.0) * mass) * before
        moment += tl.sum(part * tl.where(counted, score - shift[:, None], 0.0), 1)
        mass = mass * before + tl.sum(part, 1)
        most = larger
        packs = packed(chosen, tl.zeros([TOKENS, KEYS], tl.int64) + place[None, :])
        packs = tl.where((place < n)[None, :], packs, least)
        both = tl.join(kept, tl.topk(packs, KEPT)).reshape(TOKENS, 2 * KEPT)
        kept = tl.topk(both, KEPT)
    row = (token * heads + head) * 2 + side
    slots = tl.arange(0, KEPT)
    tl.store(best + row[:, None] * KEPT + slots[None, :], kept, mask=here[:, None])
    log = tl.log(mass)
    tl.store(sums + row * 2, log + most, mask=here)
    tl.store(sums + row * 2 + 1, log - moment / mass, mask=here)


@triton.jit
def combine(
    scores, indices, best, first_ranks, second_ranks, queries, first, second, rows, heads, shared, n1, n2, half, k,
    pairs, BIASED: tl.constexpr, KEPT: tl.constexpr, WANTED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The k best sums of pairs on the staircase, ties to the lowest id; biased scores are computed again without."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    pair = tl.arange(0, PAIRS)
    i = tl.load(first_ranks + pair, mask=pair < pairs, other=0)
    j = tl.load(second_ranks + pair, mask=pair < pairs, other=0)
    live = here[:, None] & (pair < pairs)[None, :]
    one = tl.load(best + row[:, None] * 2 * KEPT + i[None, :], mask=live, other=0)
    two = tl.load(best + (row[:, None] * 2 + 1) * KEPT + j[None, :], mask=live, other=0)
    packs = packed(value_of(one) + value_of(two), place_of(one) * n2 + place_of(two))
    packs = tl.topk(tl.where(live, packs, -0x7FFFFFFFFFFFFFFF), WANTED)
    slot = tl.arange(0, WANTED)
    wanted = here[:, None] & (slot < k)[None, :]
    ids, value = place_of(packs), value_of(packs)
    if BIASED:
        key_head = tl.where(shared, 0, row % heads)
        open_ = wanted & (value > float("-inf"))
        value = tl.where(open_, 0.0, float("-inf"))
        for column in range(0, half, CHUNK):
            columns = column + tl.arange(0, CHUNK)
            inside = (columns < half)[None, None, :]
            for side in tl.static_range(2):
                q = tl.load(
                    queries + (row[:, None, None] * 2 + side) * half + columns[None, None, :],
                    mask=here[:, None, None] & inside,
                    other=0.0,
                ).to(tl.float32)
                if side == 0:
                    key = first + (key_head[:, None] * n1 + ids // n2)[:, :, None] * half
                else:
                    key = second + (key_head[:, None] * n2 + ids % n2)[:, :, None] * half
                c = tl.load(key + columns[None, None, :], mask=open_[:, :, None] & inside, other=0.0).to(tl.float32)
                value += tl.sum(q * c, 2)
    place = row[:, None] * k + slot[None, :]
    tl.store(scores + place, value, mask=wanted)
    tl.store(indices + place, ids, mask=wanted)
