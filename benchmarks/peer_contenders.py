"""PEER-pytorch and ours on the same weights, in their forms: as they come, in plain torch, with their optimisers."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernel_setting import kernels_set
from mixwright.experts.table import NeuronTable
from mixwright.methods.peer.layer import PEER
from mixwright.routing import Condition

HEADS, TOP_K, HALF = 8, 16, 128
PAIRS = HEADS * TOP_K
THEIRS, OURS, PLAIN = "PEER-pytorch", "mixwright", "mixwright, plain torch"
ADAMW, LAZY, ADAGRAD = "fused AdamW", "LazyAdamW", "RowwiseAdagrad"
_FILLED = 4096


class Layers:
    """Both layers with `side * side` experts of width `dim`, paper preset, 128 numbers in half a key."""

    def __init__(self, side: int, dim: int, dtype: torch.dtype) -> None:
        torch.manual_seed(side + dim)
        self.side, self.dim, self.dtype = side, dim, dtype
        self.ours = self._ours()
        self.theirs: nn.Module | None = None

    def _bare(self) -> PEER:
        with torch.device("meta"):
            return PEER(
                self.dim, (self.side, self.side), heads=HEADS, top_k=TOP_K, dim_key=2 * HALF, gate="softmax",
                query_norm="none", share_keys=False,
            ).to(self.dtype)  # fmt: skip

    def _ours(self) -> PEER:
        layer = self._bare()
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                _fill(parameter, 1.0 if "rows" in name else 0.02 if "keys" in name else self.dim**-0.5)
            for buffer in layer.buffers():
                buffer.zero_()
        return layer

    @torch.no_grad()
    def add_theirs(self) -> None:
        """PEER-pytorch's layer with our weights, in memory of its own as its embeddings take it."""
        from PEER_pytorch import PEER as Theirs

        with torch.device("meta"):
            layer: Any = Theirs(
                self.dim, heads=HEADS, num_experts=self.side**2, num_experts_per_head=TOP_K, dim_key=HALF,
                non_competing_scores=False,
            ).to(self.dtype)  # fmt: skip
        layer.to_empty(device="cpu")
        router, rows = self.ours.router, _table(self.ours).rows
        layer.keys[:, :, 0], layer.keys[:, :, 1] = router.keys_first, router.keys_second
        queries = router.queries.weight.view(HEADS, 2, HALF, self.dim).transpose(0, 1)
        layer.to_queries[0].weight.copy_(queries.reshape(-1, self.dim))
        for part, embedding in enumerate((layer.weight_down_embed, layer.weight_up_embed)):
            embedding.weight.copy_(rows[:, part])
        self.theirs = layer

    def drop_theirs(self) -> None:
        self.theirs = None
        gc.collect()

    def twin(self) -> PEER:
        """Ours once more: rows in the same memory, everything else its own."""
        layer = self._bare()
        layer.router.to_empty(device="cpu").load_state_dict(self.ours.router.state_dict())
        layer.experts.table = NeuronTable(_table(self.ours).rows.detach())
        return layer

    def input(self, tokens: int, *, grad: bool = False) -> Tensor:
        made = torch.Generator().manual_seed(tokens)
        return torch.randn(1, tokens, self.dim, generator=made).to(self.dtype).requires_grad_(grad)

    def ids(self, tokens: int) -> Tensor:
        """Experts in random order, as evenly as can be: nothing helps a cache."""
        return torch.randint(self.side**2, (tokens, PAIRS), generator=torch.Generator().manual_seed(tokens))

    def check(self) -> float:
        """The largest difference of the outputs, relative to the largest output."""
        assert self.theirs is not None
        x = self.input(8)
        with torch.no_grad():
            mine, other = self.ours.eval()(x).float(), self.theirs(x).float()
        return float((mine - other).abs().max() / other.abs().max())

    def forwards(self, tokens: int) -> dict[str, Callable[[], object]]:
        """A pass without gradients of the whole layer, and of its phases."""
        x, ours, table = self.input(tokens), self.ours.eval(), _table(self.ours)
        flat, weights, ids = x[0], torch.rand(tokens, PAIRS), self.ids(tokens)
        runs: dict[str, Callable[[], object]] = {OURS: lambda: ours(x), PLAIN: off(lambda: ours(x))}
        runs["route"] = lambda: ours.router(x, Condition())
        runs["experts"] = lambda: table(flat, weights, ids, "gelu")
        if self.theirs is not None:
            theirs = self.theirs.eval()
            runs = {THEIRS: lambda: theirs(x), **runs}
        return runs


def trained(layer: nn.Module, optimizer: Any, x: Tensor) -> Callable[[], object]:
    """A training step: forward, backward with all gradients, the optimiser."""
    layer.train()
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def step() -> None:
        layer(x).backward(seed)
        if optimizer is not None:
            optimizer.step()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def off(run: Callable[[], object]) -> Callable[[], object]:
    """The same in plain torch."""

    def plain() -> object:
        with kernels_set("off"):
            return run()

    return plain


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def grown(run: Callable[[], object]) -> int:
    """The most resident memory during `run`, beyond what was there before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def _table(layer: PEER) -> NeuronTable:
    table = layer.experts.table
    assert isinstance(table, NeuronTable)
    return table


def _fill(parameter: Tensor, std: float) -> None:
    """Normal numbers; beyond some thousand experts the same again, which no timing sees."""
    block = torch.randn(min(len(parameter), _FILLED), *parameter.shape[1:]).mul_(std)
    for at in range(0, len(parameter), _FILLED):
        part = parameter[at : at + _FILLED]
        part.copy_(block[: len(part)])
