"""Which parameters of a backbone experts may change: chosen by globs, each tensor once, whatever names it has."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn


def maskable(
    backbone: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, torch.Size]:
    """The shapes of the parameters that may change, by their first name.

    A tied parameter is chosen, or left out, by any of its names. Buffers, such as running statistics, and parameters
    that hold no floating-point numbers never are. Raises ValueError for a glob that names nothing, and if nothing is
    left.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            names.setdefault(parameter, []).append(name)
    known = [name for alike in names.values() for name in alike]
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{pattern!r} selects none of the {len(known)} parameters ({', '.join(known[:3])}, ...).")
    chosen = {
        alike[0]: parameter.shape
        for parameter, alike in names.items()
        if _named(alike, include) and not _named(alike, exclude)
    }
    if not chosen:
        raise ValueError("include and exclude leave no parameter that may change.")
    return chosen


def _named(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
