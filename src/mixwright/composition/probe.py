"""One look at a backbone at work: when each site runs, on which tokens, and which sites read the same tensor.

Names do not tell any of that in a foreign model, and one forward pass does.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.inputs import example_inputs
from mixwright.errors import IncompatibleExpert
from mixwright.sites import fused_sites, target_sites

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the probe saw of one site.

    `order`: its place in the pass. `stream`: the tokens it works on: `decoder` (the main stream, also of a model with
    no encoder), `encoder`, `cross` (a decoder's layer fed with encoder states), or `alone/<path>` where its input has
    no batch and token axes of a stream, such as a pooler's. `group`: sites of one group read the same tensor. `flat`:
    the tokens come in one axis, without the batch. `looks_ahead`: early tokens of the only stream see later ones.
    """

    order: int
    stream: str
    group: int
    flat: bool = False
    looks_ahead: bool = False

    @property
    def shared_as(self) -> str:
        """The stream as whose tokens a router shares decisions: a main stream that looks ahead is an encoder's."""
        return "encoder" if self.looks_ahead and self.stream == "decoder" else self.stream


@dataclass(frozen=True, slots=True)
class Probe:
    """Site path -> what was seen of it, in the order of the pass. `ran` is false where the model could not be run."""

    sites: Mapping[str, Seen]
    ran: bool

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The sites by shared input tensor, each group in the order of the pass."""
        members: dict[int, list[str]] = {}
        for path, seen in self.sites.items():
            members.setdefault(seen.group, []).append(path)
        return tuple(tuple(paths) for paths in members.values())

    def streams(self) -> dict[str, str]:
        """Site path -> its stream."""
        return {path: seen.stream for path, seen in self.sites.items()}


@dataclass(slots=True)
class _Log:
    inputs: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    inside: dict[str, bool] = field(default_factory=dict)
    in_encoder: bool = False


def probe(backbone: nn.Module, sites: Sequence[str], inputs: Mapping[str, Any] | None = None) -> Probe:
    """Run `backbone` once, without gradient and in eval mode, and report on `sites`.

    `inputs` are keyword arguments of its forward; without them they are made from its config. A model for which that
    is impossible is not run: every site then stands alone, in one stream, in the order of the modules. Raises
    IncompatibleExpert for a site that the model does not call, where an expert would have no effect.
    """
    refuse_tied(backbone, sites)
    given = example_inputs(backbone) if inputs is None else dict(inputs)
    log = _run(backbone, sites, given, must=inputs is not None) if given is not None else None
    if log is None:
        return Probe({path: Seen(i, "decoder", i) for i, path in enumerate(sites)}, ran=False)
    uncalled = _uncalled(backbone, sites, log)
    if uncalled:
        raise IncompatibleExpert(
            "TARGET",
            uncalled[0],
            "the backbone has this layer but does not always call it in a forward pass (its owner reads the weight "
            "itself, or skips it), so an expert here would do nothing. Leave this site out.",
        )
    ahead = inputs is None and _looks_ahead(backbone, sites, given or {}, log)
    seen = _seen(log, _stream_lengths(given or {}, log), looks_ahead=ahead)
    for path in sites:
        seen.setdefault(path, Seen(len(seen), f"alone/{path}", -1 - len(seen)))
    return Probe(seen, ran=True)


def called_sites(backbone: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """The linear layers that `patterns` name (see `sites.target_sites`), of `all-linear` only those that are called.

    Layers that the backbone has and never calls are no fault of somebody who asked for all of them.
    """
    everything = target_sites(backbone, patterns)
    named = [pattern for pattern in patterns if pattern != "all-linear"]
    chosen = set(target_sites(backbone, named)) if named else set[str]()
    given = example_inputs(backbone)
    log = None if given is None else _run(backbone, everything, given, must=False)
    dropped = () if log is None else _uncalled(backbone, everything, log)
    return tuple(path for path in everything if path in chosen or path not in dropped)


def refuse_tied(backbone: nn.Module, sites: Sequence[str]) -> None:
    """Raise IncompatibleExpert for a site whose weight another module of another kind shares, such as a tied head."""
    owners: dict[int, set[nn.Module]] = {}
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    for path in sites:
        weight = getattr(backbone.get_submodule(path), "weight", None)
        if len(owners.get(id(weight), ())) > 1:
            raise IncompatibleExpert(
                "TARGET",
                path,
                "its weight is tied to another layer's (a head tied to the embeddings), so an expert here would have "
                "been trained on a change of both. Leave this site out.",
            )


def _run(backbone: nn.Module, sites: Sequence[str], inputs: Mapping[str, Any], *, must: bool) -> _Log | None:
    log = _Log()
    with ExitStack() as hooks, eval_mode(backbone):
        for path in sites:
            handle = backbone.get_submodule(path).register_forward_pre_hook(_recorder(path, log))
            hooks.callback(handle.remove)
        encoder = encoder_of(backbone)
        if encoder is not None:
            hooks.callback(encoder.register_forward_pre_hook(_marker(log, inside=True)).remove)
            hooks.callback(encoder.register_forward_hook(_marker(log, inside=False)).remove)
        try:
            backbone(**inputs)
        except Exception:
            if must:
                raise
            return None  # a foreign model whose inputs we guessed wrongly
    return log


def _uncalled(backbone: nn.Module, sites: Sequence[str], log: _Log) -> tuple[str, ...]:
    """Sites that no pass will call. One of many like parts that ran, such as an idle expert of a sparse layer, may."""
    alive = {_DIGITS.sub("#", path) for path in log.inputs}
    fused = fused_sites(backbone)
    return tuple(path for path in sites if path in fused or _DIGITS.sub("#", path) not in alive)


def _recorder(path: str, log: _Log) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if path not in log.inputs and args and isinstance(args[0], Tensor):
            log.inputs[path] = args[0]
            log.versions[path] = args[0]._version  # the only way to see a change in place
            log.inside[path] = log.in_encoder

    return record


def _marker(log: _Log, *, inside: bool) -> Any:
    def mark(*_: Any) -> None:
        log.in_encoder = inside

    return mark


def encoder_of(backbone: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder, or None."""
    if not getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return None
    find = getattr(backbone, "get_encoder", None)
    encoder = find() if find is not None else getattr(backbone, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and encoder is not backbone else None


def _stream_lengths(inputs: Mapping[str, Any], log: _Log) -> dict[str, tuple[int, int]]:
    """The leading axes (batch, tokens) of each stream's activations, as most sites have them; else as the ids do."""
    main, ids = inputs.get("decoder_input_ids"), inputs.get("input_ids")
    if not isinstance(main, Tensor):
        return _commonest("decoder", list(log.inputs.values())) or _axes("decoder", ids)
    source = _commonest("encoder", [x for path, x in log.inputs.items() if log.inside[path]])
    return {"decoder": (main.shape[0], main.shape[1]), **(source or _axes("encoder", ids))}


def _commonest(stream: str, activations: Sequence[Tensor]) -> dict[str, tuple[int, int]]:
    axes = [(x.shape[0], x.shape[1]) for x in activations if x.dim() == 3]
    return {stream: max(axes, key=axes.count)} if axes else {}


def _axes(stream: str, ids: Any) -> dict[str, tuple[int, int]]:
    return {stream: (ids.shape[0], ids.shape[1])} if isinstance(ids, Tensor) and ids.dim() == 2 else {}


def _looks_ahead(backbone: nn.Module, sites: Sequence[str], inputs: Mapping[str, Any], log: _Log) -> bool:
    """Whether the first token of a model with one stream sees the last one, as in BERT: its states are then another."""
    name = next((key for key in ("input_ids", "pixel_values") if key in inputs), None)
    if name is None or "decoder_input_ids" in inputs:
        return False
    other = inputs[name].clone()
    if other.is_floating_point():
        other[..., -1, :] += 1.0
    else:
        other[:, -1] = torch.where(other[:, -1] == other[:, 0], other[:, 1], other[:, 0])
    again = _run(backbone, sites, {**inputs, name: other}, must=False)
    if again is None:
        return False
    pairs = [(x, again.inputs[path]) for path, x in log.inputs.items() if x.dim() == 3 and path in again.inputs]
    pairs = [(x, y) for x, y in pairs if not x.is_meta]  # which has no values to compare
    return any(x.shape == y.shape and not torch.allclose(x[:, 0], y[:, 0], atol=1e-6) for x, y in pairs)


def _seen(log: _Log, lengths: Mapping[str, tuple[int, int]], *, looks_ahead: bool) -> dict[str, Seen]:
    groups: dict[tuple[int, int], int] = {}
    seen: dict[str, Seen] = {}
    for order, (path, x) in enumerate(log.inputs.items()):
        group = groups.setdefault((id(x), log.versions[path]), len(groups))
        stream = _stream(x, lengths, inside=log.inside[path])
        flat = stream is not None and x.dim() == 2
        seen[path] = Seen(order, stream or f"alone/{path}", group, flat=flat, looks_ahead=looks_ahead)
    return seen


def _stream(x: Tensor, lengths: Mapping[str, tuple[int, int]], *, inside: bool) -> str | None:
    for name, (batch, tokens) in lengths.items():
        if x.shape[:-1] in ((batch, tokens), (batch * tokens,)):
            if name == "encoder":
                return "encoder" if inside else "cross"
            return None if inside else "decoder"
    return None
