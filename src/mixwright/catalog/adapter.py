"""Bytes that were validated become tensors: LoRA factors, gates and signatures, as the rest of the house takes them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.catalog.bundle import Bundle
from mixwright.catalog.card import GATES, SIGNATURES, WEIGHTS, ExpertCard
from mixwright.catalog.header import Header, TensorEntry
from mixwright.catalog.refusal import Faults, quote

MAX_VALUE = 65504.0  # the largest float16; a trained factor stays far below one
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """The update of one site: scale * up @ down. The factors are float32, whatever the file's dtype."""

    down: Float[Tensor, "rank d_in"]
    up: Float[Tensor, "d_out rank"]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """An expert out of the catalogue: its factors by site and, where it brought them, gates and signatures."""

    id: str
    factors: dict[str, LoraFactors]
    gates: dict[str, Float[Tensor, " d_in"]] | None
    signatures: dict[str, dict[str, Tensor]] | None
    card: ExpertCard


def build_factors(bundle: Bundle, where: str) -> dict[str, LoraFactors]:
    """The factors of every site, in the order of their paths. Raises CatalogError (VALUE)."""
    faults, data, header = Faults(where), bundle.files[WEIGHTS], bundle.headers[WEIGHTS]
    factors = {
        path: LoraFactors(
            build_tensor(data, header, site.down, faults), build_tensor(data, header, site.up, faults), site.scale
        )
        for path, site in bundle.sites.items()
    }
    faults.check()
    return factors


def build_gates(bundle: Bundle, where: str) -> dict[str, Tensor] | None:
    """The gate vector of every site, or None where the expert has none. Raises CatalogError (VALUE)."""
    tensors = _named(bundle, GATES, where)
    return None if tensors is None else {path: tensors[path] for path in bundle.sites}


def build_signatures(bundle: Bundle, where: str) -> dict[str, dict[str, Tensor]] | None:
    """The statistics of every site that has any, or None. Raises CatalogError (VALUE)."""
    tensors = _named(bundle, SIGNATURES, where)
    if tensors is None:
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        path, _, statistic = name.rpartition("/")
        found.setdefault(path, {})[statistic] = tensor
    return found


def build_expert(expert_id: str, bundle: Bundle, card: ExpertCard, where: str) -> Expert:
    """All of an expert. Raises CatalogError (VALUE)."""
    gates, signatures = build_gates(bundle, where), build_signatures(bundle, where)
    return Expert(expert_id, build_factors(bundle, where), gates, signatures, card)


def build_tensor(data: bytes, header: Header, entry: TensorEntry, faults: Faults, limit: float = MAX_VALUE) -> Tensor:
    """The values of one tensor as float32; what is not finite, or over `limit`, is added to `faults`."""
    count = (entry.end - entry.start) // _DTYPES[entry.dtype].itemsize
    if count == 0:
        return torch.empty(entry.shape)
    # frombuffer warns of read-only bytes, and wants aligned ones: a copy is neither.
    piece = bytearray(memoryview(data)[header.data_start + entry.start : header.data_start + entry.end])
    values = torch.frombuffer(piece, dtype=_DTYPES[entry.dtype]).to(torch.float32).reshape(entry.shape)
    largest = values.abs().max().item()
    if not largest <= limit:  # also for NaN
        what = (
            "NaN or infinite values" if largest != largest or largest == float("inf") else f"values up to {largest:g}"
        )
        faults.add("VALUE", f"{quote(entry.name)} holds {what}; finite values up to {limit:g} are accepted.")
    return values


def _named(bundle: Bundle, name: str, where: str) -> dict[str, Tensor] | None:
    if name not in bundle.files:
        return None
    faults, header = Faults(where), bundle.headers[name]
    limit = MAX_VALUE if name == GATES else torch.finfo(torch.float32).max
    tensors = {
        key: build_tensor(bundle.files[name], header, entry, faults, limit) for key, entry in _entries(header).items()
    }
    faults.check()
    return tensors


def _entries(header: Header) -> Mapping[str, TensorEntry]:
    return header.tensors
