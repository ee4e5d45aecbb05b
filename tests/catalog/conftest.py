"""A small backbone, a catalogue for it, and a builder of adapter folders, good and bad."""

import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixwright.catalog.store import Catalog

WIDTHS = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64",
          "torch.int8": "I8", "torch.float8_e4m3fn": "F8_E4M3"}  # fmt: skip


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, 2 * width)
        self.o_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(torch.tanh(self.v_proj(torch.tanh(self.q_proj(x)))))


class Backbone(nn.Module):
    """Two blocks and a head; no transformers, so that these tests start quickly."""

    def __init__(self, width: int = 8, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Specimen:
    """An adapter in memory, to be spoilt and written: its tensors by name, and its adapter_config.json."""

    def __init__(self, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj", "o_proj"), seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        widths = {"q_proj": (8, 8), "v_proj": (8, 16), "o_proj": (16, 8)}
        self.tensors: dict[str, torch.Tensor] = {}
        for layer in range(2):
            for name in targets:
                d_in, d_out = widths[name]
                stem = f"base_model.model.layers.{layer}.{name}"
                self.tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / 3
                self.tensors[f"{stem}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) / 3
        self.config: dict[str, Any] = {
            "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "somebody/small", "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layer_replication": None,
            "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8,
            "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
            "peft_type": "LORA", "r": rank, "rank_pattern": {}, "revision": None, "target_modules": list(targets),
            "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
        }  # fmt: skip

    def rename(self, old: str, new: str) -> None:
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}

    def first(self, ending: str) -> str:
        return next(name for name in self.tensors if name.endswith(ending))

    def entries(self) -> tuple[dict[str, Any], bytes]:
        """Header entries and data, laid out one after the other."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = b""
        for name, tensor in self.tensors.items():
            piece = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            entries[name] = {
                "dtype": WIDTHS[str(tensor.dtype)],
                "shape": list(tensor.shape),
                "data_offsets": [len(data), len(data) + len(piece)],
            }
            data += piece
        return entries, data

    @staticmethod
    def file(header: bytes, data: bytes) -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def weights(self) -> bytes:
        entries, data = self.entries()
        return self.file(json.dumps(entries).encode(), data)

    def write(self, folder: Path, *, config: bytes | None = None, weights: bytes | None = None) -> Path:
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_bytes(json.dumps(self.config).encode() if config is None else config)
        (folder / "adapter_model.safetensors").write_bytes(self.weights() if weights is None else weights)
        return folder


@pytest.fixture(scope="session")
def backbone() -> nn.Module:
    """The backbone; tests must not change it."""
    return Backbone()


@pytest.fixture(scope="session")
def another_backbone() -> nn.Module:
    return Backbone(seed=7)


@pytest.fixture
def specimen() -> type[Specimen]:
    return Specimen


@pytest.fixture
def catalog(tmp_path: Path, backbone: nn.Module) -> Catalog:
    return Catalog(tmp_path / "catalogue", backbone)


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes: equal before and after means untouched."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    return read


@pytest.fixture
def no_hang() -> Callable[[float], AbstractContextManager[None]]:
    """A guard that ends what takes longer: a pipe that blocks, a pattern that backtracks."""

    @contextmanager
    def guard(seconds: float) -> Iterator[None]:
        def ring(*_: object) -> None:
            raise TimeoutError(f"longer than {seconds} s")

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return guard


@pytest.fixture
def root_only_skip() -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
