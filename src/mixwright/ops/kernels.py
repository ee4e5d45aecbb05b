"""Compiled twins of `add_grouped` and of the fused `build`: built on first use into the user's cache, never needed.

MIXWRIGHT_KERNELS says what may happen: `auto` (the default) builds once where a C compiler is found and says so in the
log, `built` uses what an earlier run built, `off` stays with torch. Whatever fails leaves torch's own path in use, and
`status()` says why. The kernels take threads from the OpenMP runtime that torch has loaded and link none of their own.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SETTING = "MIXWRIGHT_KERNELS"
SETTINGS = ("auto", "built", "off")
NATIVE = Path(__file__).parent / "native"
SOURCES = tuple(NATIVE / name for name in (
    "lora.c", "tensor_product.c", "neuron.c", "neuron_backward.c", "neuron_rows.c", "row_update.c",
    "product_key.c", "selected_scores.c", "interpolate.c",
))  # fmt: skip
HEADERS = tuple(NATIVE / name for name in ("turn.h", "rows.h", "neuron.h", "row_top.h"))
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-fopenmp")

logger = logging.getLogger(__name__)


class KernelUnavailable(Exception):
    """Why the compiled path is not in use."""


class Kernels(NamedTuple):
    """The C functions, each `mixwright_<field>` there; the paths in `ops` call them."""

    add_lora: Callable[..., int]
    build: Callable[..., None]
    build_backward: Callable[..., None]
    neurons: Callable[..., int]
    neurons_backward: Callable[..., None]
    sort_pairs: Callable[..., int]
    neurons_rows: Callable[..., None]
    product_key: Callable[..., int]
    route_few: Callable[..., int]
    selected: Callable[..., None]
    selected_backward: Callable[..., None]
    lagging_rows: Callable[..., int]
    adamw_rows: Callable[..., None]
    replay_rows: Callable[..., None]
    adagrad_rows: Callable[..., None]
    decay_rows: Callable[..., None]
    interpolate: Callable[..., None]
    interpolate_backward: Callable[..., None]
    interpolate_members: Callable[..., None]
    mask_sums: Callable[..., None]
    expected_l0_backward: Callable[..., None]


_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_ARGUMENTS = {
    "add_lora": "p" * 7 + "i" * 6 + "pp",
    "build": "p" * 6 + "i" * 9,
    "build_backward": "p" * 11 + "i" * 9,
    "neurons": "p" * 8 + "i" * 8,
    "neurons_backward": "p" * 10 + "i" * 8,
    "sort_pairs": "p" * 5 + "i" * 2,
    "neurons_rows": "p" * 8 + "i" * 6,
    "product_key": "p" * 6 + "i" * 9,
    "route_few": "p" * 8 + "i" * 10,
    "selected": "p" * 5 + "i" * 7,
    "selected_backward": "p" * 8 + "i" * 7,
    "lagging_rows": "ppiiippp",
    "adamw_rows": "p" * 5 + "iii" + "f" * 7 + "i",
    "replay_rows": "p" * 5 + "iii" + "p" * 6 + "ifi",
    "adagrad_rows": "p" * 4 + "iiii" + "fff" + "i",
    "decay_rows": "ppp" + "iiii",
    "interpolate": "p" * 5 + "iii",
    "interpolate_backward": "p" * 7 + "iiii" + "f",
    "interpolate_members": "p" * 5 + "i",
    "mask_sums": "ppp" + "iii",
    "expected_l0_backward": "ppp" + "ii",
}
"""What each of `Kernels` takes: p a pointer, i an int64, f a float."""
_RETURNS = {
    "add_lora": ctypes.c_int,
    "neurons": ctypes.c_int,
    "sort_pairs": ctypes.c_int64,
    "product_key": ctypes.c_int,
    "route_few": ctypes.c_int,
    "lagging_rows": ctypes.c_int64,
}
"""What they return, where it is not nothing."""


def kernel() -> Kernels | None:
    """The C functions, built if they may be; None where torch's own path has to do."""
    found = _loaded(os.environ.get(SETTING, "auto"), os.environ.get("XDG_CACHE_HOME"))
    return None if isinstance(found, str) else found


def status() -> str:
    """One line for `mixwright doctor`: whether the compiled path is in use, and why not. Builds nothing."""
    setting = os.environ.get(SETTING, "auto")
    if setting == "auto" and not library(cache_folder()).exists():
        try:
            return f"not built yet: the first inference on this CPU compiles it with {compiler()}, once"
        except KernelUnavailable as reason:
            return f"not in use: {reason}; torch's own path runs instead"
    found = _loaded(setting, os.environ.get("XDG_CACHE_HOME"))
    if not isinstance(found, str):
        return f"in use: {library(cache_folder())}"
    return f"not in use: {found}; torch's own path runs instead"


def build() -> Path:
    """Compile now, whatever the setting says, unless it is there; where the library is.

    Raises KernelUnavailable, OSError or SubprocessError.
    """
    path = library(cache_folder())
    if not path.exists():
        compile_to(path)
    _refuse_foreign(path)
    return path


@cache  # a library can be loaded into a process only once, so what is known of it belongs to the process
def _loaded(setting: str, cache_home: str | None) -> Kernels | str:
    del cache_home  # only tells one cache folder from another
    try:
        return load(setting, cache_folder())
    except (KernelUnavailable, OSError, subprocess.SubprocessError) as reason:
        if setting != "off":
            logger.info("compiled dispatch is not in use: %s", reason)
        return str(reason)


def load(setting: str, folder: Path) -> Kernels:
    """The C functions from the library in `folder`, compiled first if `setting` is `auto` and it is not there.

    Raises KernelUnavailable, OSError or SubprocessError.
    """
    if setting not in SETTINGS:
        raise KernelUnavailable(f"{SETTING}={setting!r} is unknown; accepted are {', '.join(SETTINGS)}")
    if setting == "off":
        raise KernelUnavailable(f"{SETTING}=off")
    path = library(folder)
    if not path.exists():
        if setting == "built":
            raise KernelUnavailable(f"{SETTING}=built, and nothing is built in {folder}")
        compile_to(path)
    _refuse_foreign(path)
    held = ctypes.CDLL(str(path))
    return Kernels(*(_declared(held, name) for name in Kernels._fields))


def _declared(held: ctypes.CDLL, name: str) -> Callable[..., Any]:
    function = getattr(held, f"mixwright_{name}")
    function.argtypes = [_TYPES[letter] for letter in _ARGUMENTS[name]]
    function.restype = _RETURNS.get(name)
    return function


def compile_to(path: Path) -> None:
    """Compile to `path`, whole or not at all. Raises KernelUnavailable, OSError or SubprocessError."""
    command = compiler()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger.info("compiling the kernels with %s, once, into %s", command, path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        linked = Path(folder) / "kernels.so"
        made = [Path(folder) / f"{source.stem}.o" for source in SOURCES]
        _run([[command, *FLAGS, "-c", str(one), "-o", str(to)] for one, to in zip(SOURCES, made, strict=True)])
        # Linking without -fopenmp leaves its symbols to torch's runtime: one pool of threads.
        _run([[command, "-shared", *map(str, made), "-lm", "-o", str(linked)]])
        linked.chmod(0o700)
        linked.replace(path)


def _run(commands: Sequence[Sequence[str]]) -> None:
    """All of them at once. Raises KernelUnavailable for the first that fails."""
    with ExitStack() as running:
        started = [running.enter_context(subprocess.Popen(one, stderr=subprocess.PIPE, text=True)) for one in commands]
        for process in started:
            running.callback(process.kill)
        for command, process in zip(commands, started, strict=True):
            said = process.communicate(timeout=120)[1]
            if process.returncode:
                message = (said.strip().splitlines() or ["no message"])[0]
                raise KernelUnavailable(f"{command[0]} failed: {message}")


def compiler() -> str:
    """The C compiler: $CC, cc or gcc. Raises KernelUnavailable where there is none, or no Linux."""
    if platform.system() != "Linux":
        raise KernelUnavailable(f"compiled paths are made for Linux only, not {platform.system()}")
    for name in (os.environ.get("CC"), "cc", "gcc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise KernelUnavailable("no C compiler (cc or gcc) is on the PATH")


def cache_folder() -> Path:
    """Where the library is kept: $XDG_CACHE_HOME/mixwright/kernels, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixwright" / "kernels"


def library(folder: Path) -> Path:
    """The library's path, named for the sources, the flags, torch and the processor: any change makes another file."""
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in (*SOURCES, *HEADERS)))
    digest.update(f"{FLAGS}{torch.__version__}{_processor()}".encode())
    return folder / f"kernels-{digest.hexdigest()[:16]}.so"


@cache  # read from a file, and it cannot change
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def _refuse_foreign(path: Path) -> None:
    for place in (path, path.parent):
        found = place.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise KernelUnavailable(f"{place} is another user's, or others may write to it; remove it")


def add_native(
    function: Callable[..., int],
    out: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    weights: Tensor,
    indices: Tensor,
) -> Tensor:
    """`add_grouped` by the C function; all tensors contiguous and float32, `indices` int64."""
    (tokens, k), (experts, rank, d_in) = indices.shape, down.shape
    places = indices.new_empty(2 * experts + 1 + tokens * k)
    values = x.new_empty(tokens * k * (rank + 1))
    pointers = (tensor.data_ptr() for tensor in (out, x, down, up, scale, weights, indices))
    sizes = (tokens, k, experts, rank, d_in, up.shape[1])
    if function(*pointers, *sizes, places.data_ptr(), values.data_ptr()):
        raise IndexError(f"indices name an expert outside of the {experts} that this site has.")
    return out


def fits(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> bool:
    """Whether the C function takes these tensors as they lie."""
    return all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in (out, x, down, up, scale))
