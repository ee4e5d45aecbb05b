"""A pool in few bytes: which weights any expert changes, the values of those, and who changes which.

| tensor | what | bytes |
|---|---|---|
| `union` | a bit for each unit (weight, row or tensor): some expert's mask is not 0 | P / 8 |
| `values` | the shared change inside the union | 4 U, or 2 U |
| `live` | a bit for each expert and unit of the union: its mask is not 0 | M U / 8 |
| `fractional` | a bit for each live one, expert by expert: its mask is not 1 either | |
| `logits` | of the fractional ones | 4 or 1 each |
| `layout` | SHA-256 of what the bits are about: names, shapes, granularity, the constants of the map | 32 |

*exact*: everything that the served weights depend on, to the bit. *compact*: values in float16, fractional logits at
256 levels between the two ends. Logits whose mask is 0 or 1 are not stored: they come back at -log 100 and log 100,
the ends of their range, and the change outside the union comes back as 0.
"""

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from mixwright.errors import CatalogError
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.ops.bits import pack_bits, unpack_bits
from mixwright.ops.hard_concrete import BETA, DEAD, GAMMA, LIMIT, ZETA

Storage = Literal["exact", "compact"]

_LEVELS = 256
_DTYPES = {"exact": (torch.float32, torch.float32), "compact": (torch.float16, torch.uint8)}
_PARTS = ("union", "values", "live", "fractional", "logits", "layout")


@torch.no_grad()
def pack(deltas: SparseDeltas, storage: Storage = "exact") -> dict[str, Tensor]:
    """The tensors above. Raises ValueError for NaN and for values that float16 can't hold where it is asked for."""
    experts = deltas.num_experts
    union: list[Tensor] = []
    values: list[Tensor] = []
    live: list[Tensor] = []
    fractional: list[list[Tensor]] = [[] for _ in range(experts)]
    logits: list[list[Tensor]] = [[] for _ in range(experts)]
    for name in deltas.names:
        found, change = _plain(deltas, name)
        if not bool(torch.isfinite(found).all()) or not bool(torch.isfinite(change).all()):
            raise ValueError(f"{name}: the pool holds NaN or infinite values there; it was not saved.")
        alive = found > DEAD
        union.append(alive.any(0))
        values.append(change[union[-1]].flatten())
        live.append(alive[:, union[-1]])
        for m in range(experts):
            row = found[m][alive[m]]
            fractional[m].append(row < -DEAD)
            logits[m].append(row[fractional[m][-1]])
    joined = torch.cat([part for rows in logits for part in rows])
    return {
        "union": pack_bits(torch.cat(union)),
        "values": _stored_values(torch.cat(values), storage),
        "live": pack_bits(torch.cat(live, 1)),
        "fractional": pack_bits(torch.cat([part for rows in fractional for part in rows])),
        "logits": joined if storage == "exact" else _levels(joined),
        "layout": layout(deltas),
    }


@torch.no_grad()
def unpack(deltas: SparseDeltas, packed: Mapping[str, Tensor], storage: Storage = "exact") -> None:
    """Fill `deltas` with what was packed. Raises CatalogError (TENSOR, DTYPE, SHAPE, CONFIG, VALUE) for what can't be.

    Nothing of the pool's size is made before the tensors are known to fit each other and the pool.
    """
    union, live, fractional, logits = _checked(deltas, packed, storage)
    shares = fractional.split(live.sum(1).tolist())
    parts = logits.split([int(share.sum()) for share in shares])
    owners = [(_Row(share), _Row(part)) for share, part in zip(shares, parts, strict=True)]
    chosen, values, members = _Row(union), _Row(packed["values"].float()), _Row(live.T)
    for name in deltas.names:
        found, change = _plain(deltas, name)
        places = chosen.take(found.shape[1]).nonzero().flatten()
        whose = members.take(len(places)).T
        found.fill_(-LIMIT)
        change.zero_()
        change[places] = values.take(len(places) * change.shape[1]).view(len(places), change.shape[1])
        for m, (share, part) in enumerate(owners):
            mine = places[whose[m]]
            inside = share.take(len(mine))
            found[m, mine] = torch.full((len(mine),), LIMIT).masked_scatter(inside, part.take(int(inside.sum())))
        _put(deltas, name, found, change)


class _Row:
    """Things that are taken from the front, one after the other."""

    def __init__(self, row: Tensor) -> None:
        self._row = row
        self._at = 0

    def take(self, count: int) -> Tensor:
        """The next `count`."""
        self._at += count
        return self._row[self._at - count : self._at]


def layout(deltas: SparseDeltas) -> Tensor:
    """The SHA-256 of what the bits of a pool are about."""
    lines = [f"{deltas.num_experts} {BETA} {GAMMA} {ZETA}"]
    lines += [f"{n} {tuple(deltas.change_of(n).shape)} {tuple(deltas.logits_of(n).shape)}" for n in deltas.names]
    return torch.frombuffer(bytearray(hashlib.sha256("\n".join(lines).encode()).digest()), dtype=torch.uint8)


def _checked(deltas: SparseDeltas, packed: Mapping[str, Tensor], storage: Storage) -> tuple[Tensor, ...]:
    """Union, live, fractional and logits, once they are known to belong together."""
    lacking = sorted(set(_PARTS) ^ set(packed))
    if lacking:
        raise CatalogError("TENSOR", f"packed.{lacking[0][:80]}", "it is missing, or no part of a packed pool.")
    values, logits = packed["values"], packed["logits"]
    if (values.dtype, logits.dtype) != _DTYPES[storage] or values.dim() != 1 or logits.dim() != 1:
        raise CatalogError(
            "DTYPE",
            "packed.values",
            f"{values.dtype} beside logits of {logits.dtype}; a pool with storage {storage!r} has "
            f"{_DTYPES[storage][0]} and {_DTYPES[storage][1]} in one row each.",
        )
    if not torch.equal(packed["layout"], layout(deltas)):
        raise CatalogError(
            "CONFIG",
            "packed.layout",
            "its bits are about other tensors than this config's: include, exclude, granularity or experts changed.",
        )
    widths = torch.tensor([_width(deltas, name) for name in deltas.names])
    units = [deltas.logits_of(name)[0].numel() for name in deltas.names]
    union = _bits(packed, "union", sum(units))
    sizes = torch.tensor([int(part.sum()) for part in union.split(units)])
    if len(values) != int((sizes * widths).sum()):
        raise _misfit("values", len(values), int((sizes * widths).sum()))
    chosen = int(sizes.sum())
    if packed["live"].dim() != 2 or len(packed["live"]) != deltas.num_experts:
        raise _misfit("live", packed["live"].shape[0] if packed["live"].dim() else 0, deltas.num_experts)
    live = _bits(packed, "live", chosen)
    if not bool(live.any(0).all()):
        raise CatalogError("VALUE", "packed.live", "a weight of the union belongs to no expert.")
    fractional = _bits(packed, "fractional", int(live.sum()))
    if len(logits) != int(fractional.sum()):
        raise _misfit("logits", len(logits), int(fractional.sum()))
    if storage == "compact":
        logits = _from_levels(logits)
    if not bool(((logits > DEAD) & (logits < -DEAD)).all()):
        raise CatalogError(
            "VALUE", "packed.logits", f"there are some that are no logits between {DEAD:.4f} and its like."
        )
    return union, live, fractional, logits


def _bits(packed: Mapping[str, Tensor], name: str, count: int) -> Tensor:
    found = packed[name]
    try:
        if found.dtype != torch.uint8 or found.dim() == 0:
            raise ValueError(f"{tuple(found.shape)} {found.dtype} are no rows of bytes.")
        return unpack_bits(found, count)
    except ValueError as error:
        raise CatalogError("SHAPE", f"packed.{name}", f"it does not fit what lies beside it: {error}") from error


def _misfit(name: str, found: int, wanted: int) -> CatalogError:
    return CatalogError("SHAPE", f"packed.{name}", f"{found} where what lies beside it asks for {wanted}.")


def _stored_values(values: Tensor, storage: Storage) -> Tensor:
    if storage == "exact":
        return values.float()
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise ValueError("storage='compact': the change holds values that float16 can't; save it as 'exact'.")
    return half


def _levels(logits: Tensor) -> Tensor:
    """The nearest of 256 levels between the two ends."""
    share = (logits.double() - DEAD) / (-2 * DEAD)
    return (share * _LEVELS).floor().clamp(0, _LEVELS - 1).to(torch.uint8)


def _from_levels(levels: Tensor) -> Tensor:
    return (DEAD + (levels.double() + 0.5) * (-2 * DEAD / _LEVELS)).float()


def _width(deltas: SparseDeltas, name: str) -> int:
    """How many weights one unit holds."""
    return deltas.change_of(name).numel() // max(1, deltas.logits_of(name)[0].numel())


def _plain(deltas: SparseDeltas, name: str) -> tuple[Tensor, Tensor]:
    """Logits (experts, units) and change (units, width), on the CPU in float32."""
    logits, delta = deltas.logits_of(name), deltas.change_of(name)
    units = logits[0].numel()
    return logits.detach().cpu().float().reshape(len(logits), units), delta.detach().cpu().float().reshape(
        units, _width(deltas, name)
    )


def _put(deltas: SparseDeltas, name: str, logits: Tensor, change: Tensor) -> None:
    for parameter, found in ((deltas.logits_of(name), logits), (deltas.change_of(name), change)):
        parameter.copy_(found.reshape(parameter.shape))
