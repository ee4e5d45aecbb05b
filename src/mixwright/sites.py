"""Sites: places in a backbone, by dotted path, that a mixture can take."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer at `path`, from width `d_in` to `d_out`; `transposed` if it stores its weight as (d_in, d_out)."""

    path: str
    d_in: int
    d_out: int
    transposed: bool = False


def linear_site(path: str, module: nn.Module) -> Site | None:
    """The site that `module` is, or None if it is no linear layer. Conv1D of transformers is known by its shape."""
    if type(module) is nn.Linear:
        return Site(path, module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = module.get_parameter("weight").shape
        return Site(path, d_in, d_out, transposed=True)
    return None


def linear_sites(model: nn.Module) -> dict[str, Site]:
    """Every linear layer of a model by path, in the order of its modules; a layer that is shared is listed once."""
    found = ((path, linear_site(path, module)) for path, module in model.named_modules())
    return {path: site for path, site in found if site is not None}


def select(paths: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The paths that a pattern names: by its last parts (`q_proj`, `self_attn.q_proj`) or by a glob (`*.layers.0.*`).

    Raises ValueError for a pattern that names nothing, since that is always a misspelling.
    """
    for pattern in patterns:
        if not any(_named_by(path, pattern) for path in paths):
            endings = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise ValueError(f"no site is named {pattern!r}; the backbone's linear layers end in {', '.join(endings)}.")
    return tuple(path for path in paths if any(_named_by(path, pattern) for pattern in patterns))


def _named_by(path: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatchcase(path, pattern)
    return path == pattern or path.endswith("." + pattern)
