"""What this machine's memory allows: table rows read in random order, each once, and nothing else done."""

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixwright.ops.kernels import FLAGS, compiler

SOURCE = Path(__file__).with_suffix(".c")


def gathers(rows: Tensor, ids: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read these rows, by name; rows are `(experts, ...)`, read as floats whatever they hold."""
    library = _library()
    width = rows[0].nbytes // 4
    flat, total = ids.reshape(-1).contiguous(), torch.zeros(width)

    def run(name: str, ahead: int) -> Callable[[], object]:
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
        function.restype = None
        return lambda: function(total.data_ptr(), rows.data_ptr(), flat.data_ptr(), flat.numel(), width, ahead)

    return {
        f"{name} {ahead}": run(name, ahead)
        for name, ahead in (("gather_one", 2), ("gather_one", 4), ("gather_four", 4))
    }


def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gather_rows.so"
        subprocess.run([compiler(), *FLAGS, "-shared", str(SOURCE), "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))
