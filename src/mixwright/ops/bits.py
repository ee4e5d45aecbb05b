"""Booleans as bits: eight in a byte, the first in the lowest bit, each row padded with zeros to whole bytes."""

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor


def pack_bits(flags: Bool[Tensor, "*rows count"]) -> UInt8[Tensor, "*rows bytes"]:
    """The flags of the last axis as bytes."""
    return torch.from_numpy(np.packbits(flags.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: UInt8[Tensor, "*rows bytes"], count: int) -> Bool[Tensor, "*rows count"]:
    """`count` flags of each row back. Raises ValueError where the bytes are not as many, or the padding is not zero."""
    if packed.shape[-1] != -(-count // 8):
        raise ValueError(f"{packed.shape[-1]} bytes are no {count} bits.")
    flags = np.unpackbits(packed.cpu().numpy(), axis=-1, bitorder="little")
    if flags[..., count:].any():
        raise ValueError(f"there are bits beyond the first {count}.")
    return torch.from_numpy(flags[..., :count]).bool()
