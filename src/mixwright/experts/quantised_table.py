"""Tables of eight bits: a quarter of the bytes of float32, for inference."""

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from mixwright.experts.fetched import AbstractFetchedTable, Brought
from mixwright.experts.table import AbstractTable, NeuronTable
from mixwright.ops.neuron import Activation, combine_quantised

_LEVELS = 127
_BLOCK = 1 << 22  # numbers quantised at a time
_COARSE = 1 << 7  # scales are multiples of 2^7 in their last places, so that 127 of them is exact


class QuantisedTable(AbstractFetchedTable):
    """row ~ scale * integers of -127..127, a scale for each row part; inference only.

    On random tables a layer's output errs by about 1 %. What `dequantise` gives is quantised to the same bits again.
    """

    def __init__(
        self,
        rows: Int8[Tensor, "experts parts width"],
        scales: Float[Tensor, "experts parts"],
        bias: Float[Tensor, "experts inputs"] | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.parts, self.width = rows.shape
        self.rows: Int8[Tensor, "experts parts width"]
        self.scales: Float[Tensor, "experts parts"]
        self.bias: Float[Tensor, "experts inputs"] | None
        self.register_buffer("rows", rows)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @torch.no_grad()
    def fetch(self, ids: Int[Tensor, " ids"]) -> Brought:
        """Rows in float32, and biases."""
        rows = self.rows[ids].float().mul_(self.scales[ids, :, None])
        return Brought(rows, None if self.bias is None else self.bias[ids])

    def in_place(
        self, x: Tensor, weights: Tensor, indices: Tensor, activation: Activation
    ) -> Float[Tensor, "tokens width"] | None:
        """By the compiled path, which reads the integers themselves."""
        return combine_quantised(x, self.rows, self.scales, weights, indices, activation, self.bias)


@torch.no_grad()
def quantise(table: AbstractTable) -> QuantisedTable:
    """A table of int8 rows with a float32 scale for each row part; biases stay as they are."""
    first, bias = table.take(torch.arange(1))
    count, device = table.num_experts, first.device
    rows = torch.empty(count, table.parts, table.width, dtype=torch.int8, device=device)
    scales = torch.empty(count, table.parts, device=device)
    biases = None if bias is None else bias.new_empty(count, table.parts - 1)
    step = max(1, _BLOCK // (table.parts * table.width))
    for start in range(0, count, step):
        some = slice(start, min(start + step, count))
        wide, bias = table.take(torch.arange(some.start, some.stop))
        rows[some], scales[some] = quantise_rows(wide)
        if biases is not None and bias is not None:
            biases[some] = bias
    return QuantisedTable(rows, scales, biases)


@torch.no_grad()
def narrowed(table: AbstractTable, dtype: torch.dtype) -> NeuronTable:
    """A table whose rows are kept in a narrower type, such as bfloat16; sums run in the input's. Biases stay wide."""
    rows, bias = table.take(torch.arange(table.num_experts))
    return NeuronTable(rows.to(dtype), bias)


def in_fewer_bits(table: AbstractTable, dtype: str) -> AbstractTable:
    """The table with rows of `int8` (and a scale for each row part; it does not learn) or of `bfloat16`."""
    if dtype not in ("int8", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}; accepted are 'int8' and 'bfloat16'.")
    return quantise(table) if dtype == "int8" else narrowed(table, torch.bfloat16)


def dequantise(table: QuantisedTable) -> NeuronTable:
    """The float32 table that stands for the same values."""
    return NeuronTable(*table.fetch(torch.arange(table.num_experts)))


def quantise_rows(
    rows: Float[Tensor, "experts parts width"],
) -> tuple[Int8[Tensor, "experts parts width"], Float[Tensor, "experts parts"]]:
    """Integers, and the scales that turn them back; a row of zeros has the scale 0."""
    wide = rows.float()
    if not wide.isfinite().all():
        raise ValueError("the table holds NaN or infinite values; eight bits can hold neither.")
    scales = _coarse(wide.abs().amax(-1) / _LEVELS)
    steps = wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return steps.round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8), scales


def _coarse(scales: Tensor) -> Tensor:
    """Scales rounded up to 17 bits: 127 times one is then exact, and so is what it is divided into again."""
    bits = scales.contiguous().view(torch.int32)
    return ((bits + (_COARSE - 1)) & -_COARSE).view(torch.float32)
