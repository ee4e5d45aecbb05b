"""Digests of a model's tensors: which backbone is this, and has a bit of it changed?"""

import hashlib

import torch
from torch import Tensor, nn

_SAMPLES = 512


def fingerprint(model: nn.Module) -> str:
    """A short name for a backbone: its parameters' paths and shapes, and values sampled from each.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 has one fingerprint. Of a
    parameter on the meta device, which has no values, paths and shapes alone count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(_sample(parameter.detach()).tobytes())
    return digest.hexdigest()[:32]


def _sample(values: Tensor):
    flat = values.reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).view(torch.int16).numpy()


def tensor_digest(model: nn.Module) -> dict[str, str]:
    """The SHA-256 of every parameter and buffer, by name: equal before and after means unchanged to the bit."""
    return {name: digest_of_tensor(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def weights_digest(model: nn.Module) -> str:
    """One SHA-256 of all parameters and buffers that are saved, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
