"""Which backbone a change of its weights was made for, tensor by tensor: what lies beside such a change on disk.

The fingerprint samples a backbone; a pool that changes single weights is bound to every bit of them. A backbone that
is loaded in another dtype has other bytes: of that the fingerprint alone speaks.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mixwright.ops.digest import digest_of_tensor

SHA256, DTYPES = "packed.base_sha256", "packed.base_dtypes"
_KNOWN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def base_tensors(backbone: nn.Module, pristine: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters, those of `pristine` in their place, and the floating buffers that are saved, sorted by name."""
    saved = set(backbone.state_dict(keep_vars=True))
    buffers = {n: b for n, b in backbone.named_buffers() if n in saved and b.is_floating_point()}
    return dict(sorted({**dict(backbone.named_parameters()), **buffers, **(pristine or {})}.items()))


def digests(backbone: nn.Module, pristine: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The SHA-256 and the dtype of every tensor of a backbone, as tensors that can lie in a file."""
    tensors = base_tensors(backbone, pristine)
    hashed = [hashlib.sha256(n.encode()).digest() + bytes.fromhex(_digest(t)) for n, t in tensors.items()]
    kinds = [_KNOWN.index(t.dtype) if t.dtype in _KNOWN else 255 for t in tensors.values()]
    rows = torch.frombuffer(bytearray(b"".join(hashed)), dtype=torch.uint8) if hashed else torch.empty(0).byte()
    return {SHA256: rows.view(len(hashed), 64), DTYPES: torch.tensor(kinds, dtype=torch.uint8)}


def first_difference(stored: Mapping[str, Tensor], backbone: nn.Module) -> str | None:
    """What a backbone first differs in from the one that `digests` was taken of, in words; None: in nothing."""
    known, kinds = stored.get(SHA256), stored.get(DTYPES)
    tensors = base_tensors(backbone)
    if known is None or kinds is None:
        return None
    if known.dtype != torch.uint8 or known.dim() != 2 or known.shape[1:] != (64,) or kinds.shape != known.shape[:1]:
        return "the digests in the file, which are none"
    if len(known) != len(tensors):
        return f"the number of its tensors: {len(tensors)}, not {len(known)}"
    for row, kind, (name, tensor) in zip(known, kinds.tolist(), tensors.items(), strict=True):
        found = bytes(row.tolist())
        if found[:32] != hashlib.sha256(name.encode()).digest():
            return f"its tensors' names, from {name} on"
        comparable = kind < len(_KNOWN) and _KNOWN[kind] == tensor.dtype and not tensor.is_meta and any(found[32:])
        if comparable and found[32:] != bytes.fromhex(_digest(tensor)):
            return f"the tensor {name}"
    return None


def _digest(tensor: Tensor) -> str:
    return "00" * 32 if tensor.is_meta else digest_of_tensor(tensor)
