"""Domains from arrays: an .npz file with `images` and `labels`, or the two .gz files that MNIST is published as."""

import gzip
import io
import math
import zlib
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixwright.data.domains import Domain, tensor_domain
from mixwright.data.encoded import DAMAGED, Encoded

_LARGEST = 2 << 30
_IMAGES, _LABELS = ("images", "x", "data"), ("labels", "y", "targets")


def npz_domain(name: str, path: Path) -> Domain:
    """The domain of an .npz file: `images` (items, height, width[, channels]) in bytes, or any numbers as features.

    `labels` are numbers or texts, `class_names` names numbers. Raises ValueError for what is missing, damaged, needs
    pickle, or does not go together.
    """
    try:
        with ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise ValueError(f"{size} bytes when unpacked; at most {_LARGEST} are held in memory")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in (*_IMAGES, *_LABELS, "class_names")}
    except (*DAMAGED, ValueError, MemoryError, SyntaxError) as error:
        raise ValueError(f"{path}: not an .npz file of plain arrays ({error}).") from error
    images, labels = (_first(arrays, keys, path) for keys in (_IMAGES, _LABELS))
    names = arrays.get("class_names")
    return _domain(name, images, labels, None if names is None else [str(value) for value in names], str(path))


def idx_domain(name: str, path: Path) -> Domain:
    """The domain of MNIST's pair of files, by the path of the images; the labels lie beside them.

    Raises ValueError for a file that is missing, damaged, or not in that format.
    """
    labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels == path or not labels.is_file():
        raise ValueError(f"{path}: its labels are not beside it; expected a file {labels.name} as MNIST has it.")
    return _domain(name, _idx(path, 3), _idx(labels, 1), None, str(path))


def _domain(
    name: str, images: NDArray[np.generic], labels: NDArray[np.generic], names: list[str] | None, where: str
) -> Domain:
    if labels.ndim != 1 or images.ndim < 2 or len(images) != len(labels):
        raise ValueError(
            f"{where}: images {images.shape} and labels {labels.shape}; expected one label for each image."
        )
    numbers, names = _numbered(labels, names, where)
    return tensor_domain(name, _tensor(images, where), numbers, class_names=tuple(names))


def _tensor(images: NDArray[np.generic], where: str) -> Tensor:
    """Bytes become (items, channels, height, width); numbers stay as they are, in single precision."""
    if images.dtype == np.uint8 and images.ndim in (3, 4):
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        return pixels[:, None] if images.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    if images.dtype.kind not in "fiub":
        raise ValueError(f"{where}: images of {images.dtype}; expected bytes (uint8), or numbers.")
    return torch.from_numpy(np.ascontiguousarray(images.astype(np.float32)))


def _numbered(labels: NDArray[np.generic], names: list[str] | None, where: str) -> tuple[list[int], list[str]]:
    if labels.dtype.kind in "iu":
        numbers = [int(label) for label in labels]
        names = names or [str(label) for label in range(max(numbers, default=-1) + 1)]
        strange = next((label for label in numbers if not 0 <= label < len(names)), None)
        if strange is not None:
            raise ValueError(f"{where}: label {strange}; expected 0 to {len(names) - 1}.")
        return numbers, names
    if labels.dtype.kind != "U":
        raise ValueError(f"{where}: labels of {labels.dtype}; expected whole numbers or texts.")
    texts = [str(label) for label in labels]
    names = names or sorted(set(texts))
    strange = next((text for text in texts if text not in names), None)
    if strange is not None:
        raise ValueError(f"{where}: label {strange!r} is not among class_names.")
    return [names.index(text) for text in texts], names


def _first(arrays: dict[str, NDArray[np.generic]], keys: tuple[str, ...], path: Path) -> NDArray[np.generic]:
    found = next((arrays[key] for key in keys if key in arrays), None)
    if found is None:
        raise ValueError(f"{path}: no array called {' or '.join(keys)}.")
    return found


def _idx(path: Path, axes: int) -> NDArray[np.generic]:
    """An array of bytes: two zeros, 8, the number of axes, the length of each, then the values (LeCun, MNIST)."""
    data = Encoded(str(path), path).read()
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_LARGEST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: a damaged .gz file ({error}).") from error
    start = 4 + 4 * axes
    if len(data) < start or data[:4] != bytes((0, 0, 8, axes)):
        raise ValueError(f"{path}: not an IDX file of bytes with {axes} axes.")
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis]) for axis in range(axes))
    if math.prod(shape) != len(data) - start:
        raise ValueError(f"{path}: {len(data) - start} values for a shape of {shape}; the file is damaged.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()
