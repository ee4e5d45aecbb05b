"""Sums over single-neuron experts in plain torch: for any type and device, and where no compiler is at hand.

Products of a token with its rows are a dense-dense product sampled at the retrieved places, sums of rows are an
embedding bag, gradients of rows are bags of tokens: nothing gathers `(tokens, k, width)`. Where torch has no such
product (other types than the table's, processors without MKL) rows are gathered, a cache's worth at a time, and so they
are where few tokens come.
"""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mixwright.ops.neuron_gradients import AbstractPasses, Call, Grouped, outside
from mixwright.ops.neuron_reference import Activation, activate

TOKENS = 256
"""Tokens at a time: what is held besides the result stays the same however many there are."""

GATHERED = 1 << 20
"""Bytes of rows that are gathered at once, where they have to be: about the second cache."""

FEW = 1 << 18
"""Bytes of retrieved rows up to which gathering them is quickest: those of a token with 128 experts of width 256."""


class PlainPasses(AbstractPasses):
    """The arithmetic of `ops/neuron_gradients.py` in torch."""

    def forward(self, call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
        """TOKENS at a time."""
        low, high = call.indices.aminmax()
        if low < 0 or high >= len(call.rows):  # the sampled product would read there
            raise outside(call)
        if call.indices.numel() * call.rows[0].numel() * call.rows.element_size() <= FEW:
            return _gathered(call, keep)
        out = torch.empty_like(call.x, memory_format=torch.contiguous_format)
        before = call.x.new_empty((*call.indices.shape, call.rows.shape[1] - 1), dtype=_wide(call)) if keep else None
        for at in range(0, len(out), TOKENS):
            part = slice(at, at + TOKENS)
            found = _before(call, part)
            if before is not None:
                before[part] = found
            hidden = _said(found, call) * call.weights[part].to(found.dtype)
            out[part] = _sums(hidden, call, call.rows.shape[1] - 1, part)
        return out, before

    def backward(
        self, call: Call, dy: Tensor, before: Tensor, of_x: bool, of_weights: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """TOKENS at a time; the nonlinearity's slope by autograd, on `(tokens, k)`."""
        inputs, wide = call.rows.shape[1] - 1, before.dtype
        dx = torch.zeros_like(call.x, memory_format=torch.contiguous_format) if of_x else None
        d_weights = torch.empty_like(call.weights, memory_format=torch.contiguous_format) if of_weights else None
        factors = before.new_empty((*call.indices.shape, inputs + 1))
        for at in range(0, len(dy), TOKENS):
            part = slice(at, at + TOKENS)
            weights, along = call.weights[part].to(wide), _dots(dy[part], call, inputs, part)
            with torch.enable_grad():
                given = before[part].requires_grad_()
                said = _said(given, call)
            if inputs:
                (factors[part, :, :inputs],) = torch.autograd.grad(said, given, weights * along)
            said = said.detach()
            factors[part, :, inputs] = weights * said
            if d_weights is not None:
                d_weights[part] = said * along
            for j in range(inputs if dx is not None else 0):
                assert dx is not None
                dx[part] += _sums(factors[part, :, j], call, j, part)
        return dx, d_weights, factors

    def group(self, call: Call) -> Grouped:
        """A stable sort of the pairs that act."""
        busy = call.weights.reshape(-1).nonzero().squeeze(-1)
        ids, order = call.indices.reshape(-1)[busy].sort(stable=True)
        unique, counts = ids.unique_consecutive(return_counts=True)
        return Grouped(busy[order], unique, functional.pad(counts.cumsum(0), (1, 0)))

    def reduce(
        self, call: Call, dy: Tensor, factors: Tensor, grouped: Grouped, d_rows: Tensor | None, d_bias: Tensor | None
    ) -> None:
        """Every row a bag of tokens."""
        inputs, k = call.rows.shape[1] - 1, call.indices.shape[1]
        own = factors.view(-1, inputs + 1)[grouped.pairs]
        if d_bias is not None:
            for j in range(inputs):
                d_bias[:, j].index_add_(0, call.indices.reshape(-1)[grouped.pairs], own[:, j])
        if d_rows is None or not len(grouped.ids):
            return
        compact = len(d_rows) == len(grouped.ids)
        tokens, step = grouped.pairs // k, max(1, 4 * GATHERED // (d_rows.shape[2] * factors.element_size()))
        for j in range(inputs + 1):
            source, weights = (call.x if j < inputs else dy).to(factors.dtype).contiguous(), own[:, j].contiguous()
            for at in range(0, len(grouped.ids), step):
                starts = grouped.starts[at : at + step + 1]
                of = slice(int(starts[0]), int(starts[-1]))
                found = functional.embedding_bag(
                    tokens[of], source, starts - starts[0], mode="sum", per_sample_weights=weights[of],
                    include_last_offset=True,
                ).to(d_rows.dtype)  # fmt: skip
                if compact:
                    d_rows[at : at + step, j] = found
                else:
                    d_rows[:, j].index_copy_(0, grouped.ids[at : at + step], found)


def neurons_by_matmul(
    x: Float[Tensor, "tokens width"],
    rows: Float[Tensor, "experts parts width"],
    weights: Float[Tensor, "tokens k"],
    indices: Int[Tensor, "tokens k"],
    activation: Activation,
    bias: Float[Tensor, "experts inputs"] | None = None,
) -> Float[Tensor, "tokens width"]:
    """The whole table times x, and the pairs that were not retrieved weigh nothing: for a table of few experts."""
    wide = torch.promote_types(torch.promote_types(x.dtype, rows.dtype), torch.float32)
    inputs, table = rows.shape[1] - 1, rows.to(wide)
    whole = torch.zeros(len(x), len(rows), dtype=wide, device=x.device)
    whole = whole.scatter_add(1, indices, weights.to(wide))
    if inputs:
        before = torch.stack([x.to(wide) @ table[:, j].T for j in range(inputs)], -1)
        whole = whole * activate(before if bias is None else before + bias.to(wide), activation)
    return (whole @ table[:, -1]).to(x.dtype)


def _wide(call: Call) -> torch.dtype:
    """What sums are made in."""
    return torch.promote_types(torch.promote_types(call.x.dtype, call.rows.dtype), torch.float32)


def _said(before: Tensor, call: Call) -> Tensor:
    return activate(before, call.activation) if before.shape[-1] else before.new_ones(before.shape[:-1])


def _before(call: Call, part: slice) -> Tensor:
    """Values before the nonlinearity, `(tokens, k, parts - 1)`."""
    inputs = call.rows.shape[1] - 1
    if not inputs:
        return call.x.new_empty((*call.indices[part].shape, 0), dtype=_wide(call))
    found = torch.stack([_dots(call.x[part], call, j, part) for j in range(inputs)], -1)
    return found if call.bias is None else found + call.bias[call.indices[part]].to(found.dtype)


def _gathered(call: Call, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The sum for few tokens, whose time is that of calling torch: all rows at once."""
    (tokens, k), (_, parts, width), wide = call.indices.shape, call.rows.shape, _wide(call)
    rows = call.rows.detach().index_select(0, call.indices.reshape(-1)).to(wide).view(tokens, k * parts, width)
    before = torch.bmm(rows, call.x.to(wide)[:, :, None]).view(tokens, k, parts)[..., :-1]
    if call.bias is not None:
        before = before + call.bias[call.indices].to(wide)
    hidden = _said(before, call) * call.weights.to(wide)
    out = torch.bmm(hidden[:, None], rows.view(tokens, k, parts, width)[:, :, -1])[:, 0]
    return out.to(call.x.dtype), before.contiguous() if keep else None


def _dots(x: Tensor, call: Call, j: int, part: slice) -> Tensor:
    """<part j of a retrieved row, x>, `(tokens, k)`."""
    places, flat, wide = *_places(call, j, part), _wide(call)
    x = x.to(wide)
    if _sampled(flat, wide) and places.shape[1] <= len(flat):  # torch refuses more places than there are
        starts = torch.arange(0, places.numel() + 1, places.shape[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "in beta state", once in a process
            shape = torch.sparse_csr_tensor(
                starts, places.view(-1), x.new_zeros(places.numel()), (len(x), len(flat)), check_invariants=False
            )
        return torch.sparse.sampled_addmm(shape, x, flat.T, beta=0.0).values().view(places.shape)
    found = x.new_empty(places.shape)
    for some in _cacheful(places, flat):
        rows = flat.index_select(0, places[some].reshape(-1)).view(*places[some].shape, -1).to(wide)
        found[some] = torch.bmm(rows, x[some, :, None])[..., 0]
    return found


def _sums(factors: Tensor, call: Call, j: int, part: slice) -> Tensor:
    """Sums of part j of the retrieved rows times factors, `(tokens, width)`."""
    places, flat = _places(call, j, part)
    if flat.dtype == factors.dtype:
        return functional.embedding_bag(places, flat, mode="sum", per_sample_weights=factors.contiguous())
    found = factors.new_empty((len(places), flat.shape[1]))
    for some in _cacheful(places, flat):
        rows = flat.index_select(0, places[some].reshape(-1)).view(*places[some].shape, -1).to(factors.dtype)
        found[some] = torch.bmm(factors[some, None], rows)[:, 0]
    return found


def _places(call: Call, j: int, part: slice) -> tuple[Tensor, Tensor]:
    """Where part j of the retrieved rows lies in the table's rows one after another."""
    rows = call.rows.detach()
    flat = rows.reshape(-1, rows.shape[-1])
    return (call.indices[part] * rows.shape[1] + j).contiguous(), flat


def _sampled(flat: Tensor, wide: torch.dtype) -> bool:
    return flat.is_cpu and flat.dtype == wide and torch.backends.mkl.is_available()


def _cacheful(places: Tensor, flat: Tensor) -> list[slice]:
    step = max(1, GATHERED // (places.shape[1] * flat.shape[1] * flat.element_size()))
    return [slice(at, at + step) for at in range(0, len(places), step)]
