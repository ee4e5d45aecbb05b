"""Sites: places in a backbone, by dotted path, that a mixture can take."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "jamba", "bamba", "zamba", "zamba2")


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer at `path`, from width `d_in` to `d_out`; `transposed` if it stores its weight as (d_in, d_out)."""

    path: str
    d_in: int
    d_out: int
    transposed: bool = False


def linear_site(path: str, module: nn.Module) -> Site | None:
    """The site that `module` is, or None if it is no linear layer. Conv1D of transformers is known by its shape."""
    if isinstance(module, nn.Linear):
        return Site(path, module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        d_in, d_out = module.get_parameter("weight").shape
        return Site(path, d_in, d_out, transposed=True)
    return None


def linear_sites(model: nn.Module) -> dict[str, Site]:
    """Every linear layer of a model by path, in the order of its modules; a layer that is shared is listed once."""
    found = ((path, linear_site(path, module)) for path, module in model.named_modules())
    return {path: site for path, site in found if site is not None}


def fused_sites(model: nn.Module) -> tuple[str, ...]:
    """Linear layers that a faster implementation of the model reads past, so that an expert there may do nothing.

    State-space mixers hand `out_proj` and `dt_proj` to a fused kernel as bare weights; torch's attention does the same.
    """
    mixers = getattr(getattr(model, "config", None), "model_type", "") in _STATE_SPACE
    return tuple(
        path
        for path in linear_sites(model)
        if type(model.get_submodule(path)).__name__ == "NonDynamicallyQuantizableLinear"
        or (mixers and path.endswith((".out_proj", ".dt_proj")))
    )


def block_sites(model: nn.Module) -> tuple[str, ...]:
    """The linear layers inside a model's blocks, its numbered parts: not its embeddings, pooler or head.

    In a model without blocks, every linear layer but the output embeddings.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    fused = fused_sites(model)
    usable = [path for path in linear_sites(model) if model.get_submodule(path) is not head and path not in fused]
    return tuple(path for path in usable if any(part.isdigit() for part in path.split("."))) or tuple(usable)


def target_sites(model: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The linear layers that `patterns` name (see `select`); `all-linear` names those inside the blocks."""
    named = [pattern for pattern in patterns if pattern != "all-linear"]
    chosen = set(select(tuple(linear_sites(model)), named)) if named else set[str]()
    if len(named) < len(patterns):
        chosen.update(block_sites(model))
    return tuple(path for path in linear_sites(model) if path in chosen)


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
