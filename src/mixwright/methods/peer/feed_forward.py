"""Where a backbone keeps its feed-forward layers, told by structure: widths of linear layers, never a model's name.

A feed-forward layer goes from width d to f (twice where it is gated, or to 2 f at once) and back to d. In most families
one module does that; in BERT, OPT and BART two linear layers do, with the activation between them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.composition.inputs import example_inputs
from mixwright.errors import IncompatibleExpert
from mixwright.sites import Site, linear_site

_DIGITS = re.compile(r"\d+")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """A layer that experts stand for or beside: it answers at `path`, from width `d_in` to `d_out`.

    `entry`: the path of its first half, where the backbone keeps it in two places; else empty. `passed`: what came in
    and went out in a pass that was observed.
    """

    path: str
    d_in: int
    d_out: int
    entry: str = ""
    passed: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)


def feed_forwards(backbone: nn.Module) -> dict[str, Place]:
    """The feed-forward layers inside the blocks of a model, by path, in the order of its modules."""
    modules = dict(backbone.named_modules())
    whole = {path: place for path, module in modules.items() if (place := _whole(path, module)) is not None}
    halves = {place.path: place for place in _in_halves(modules, whole)}
    found = {**whole, **halves}
    return {path: found[path] for path in modules if path in found}


def places(backbone: nn.Module, wanted: str | Sequence[str]) -> dict[str, Place]:
    """The places that `wanted` names, in the order of the modules.

    `middle`: the feed-forward layer of the middle block, of the decoder where there are two stacks. `all`: every one.
    Otherwise paths and globs: of feed-forward layers, of blocks or parts with one inside, or of any module that takes
    one tensor and gives one. Raises ValueError for a name that fits nothing, and where there is no feed-forward layer.
    """
    known = feed_forwards(backbone)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: dict[str, Place] = {}
    for name in names:
        chosen.update(_named(backbone, known, name))
    order = {path: number for number, (path, _) in enumerate(backbone.named_modules())}
    ordered = {path: chosen[path] for path in sorted(chosen, key=order.__getitem__)}
    for path in ordered:
        inside = next((other for other in ordered if other.startswith(f"{path}.")), None)
        if inside is not None:
            raise ValueError(f"sites: {inside} lies inside of {path}; name one of them.")
    return ordered


def observed(backbone: nn.Module, found: Mapping[str, Place], *, alone: bool) -> dict[str, Place]:
    """The same places with the widths that a pass of the backbone shows; unchanged where it can't be run.

    Raises IncompatibleExpert for a layer that does not map one tensor to one of as many tokens, and with `alone` for
    one that is called with more than its input, which experts in its place could not honour.
    """
    inputs = example_inputs(backbone)
    calls = {} if inputs is None else _calls(backbone, found, inputs)
    return {path: _checked(place, calls, alone=alone) for path, place in found.items()}


def _named(backbone: nn.Module, known: Mapping[str, Place], name: str) -> Mapping[str, Place]:
    if name in ("middle", "all"):
        if not known:
            raise ValueError(
                f"sites={name!r}: this backbone has no feed-forward layers that could be found; name modules by path, "
                f"such as {_example(backbone)!r}, with mode='parallel'."
            )
        return known if name == "all" else _middle(known)
    fits = {path: place for path, place in known.items() if any(_fits(p, name) for p in _names(place))}
    if fits:
        return fits
    modules = {path: module for path, module in backbone.named_modules() if path and _fits(path, name)}
    if not modules:
        listed = ", ".join(list(known)[:4]) or _example(backbone)
        raise ValueError(
            f"sites: nothing is named {name!r}; expected 'middle', 'all', or paths or globs such as {listed}."
        )
    return {path: _any_module(path, module) for path, module in modules.items()}


def _names(place: Place) -> Iterator[str]:
    """What a feed-forward layer is called: its path and its entry's, and whatever it lies in down to its block."""
    for path in filter(None, (place.path, place.entry)):
        parts = path.split(".")
        block = next(number for number, part in enumerate(parts) if part.isdigit())
        yield from (".".join(parts[:end]) for end in range(block + 1, len(parts) + 1))


def _fits(path: str, name: str) -> bool:
    if not path:
        return False
    if any(character in name for character in "*?["):
        return fnmatchcase(path, name)
    return path == name or path.endswith(f".{name}")


def _middle(known: Mapping[str, Place]) -> dict[str, Place]:
    stacks: dict[str, list[Place]] = {}
    for path, place in known.items():
        stacks.setdefault(_DIGITS.sub("#", path), []).append(place)
    decoders = [stack for stack in stacks if "decoder" in stack]
    stack = stacks[decoders[0] if decoders else max(stacks, key=lambda name: len(stacks[name]))]
    place = stack[len(stack) // 2]
    return {place.path: place}


def _whole(path: str, module: nn.Module) -> Place | None:
    """A module that is a feed-forward layer by itself: linear layers right in it, d -> f or 2 f, and f -> d."""
    if not _DIGITS.search(path) or _is_attention(path, module):
        return None
    if hasattr(module, "experts") and isinstance(getattr(module, "gate", None), nn.Module):
        return Place(path, 0, 0)  # a sparse layer of large experts; a pass tells its widths
    linear = [site for name, child in module.named_children() if (site := linear_site(name, child)) is not None]
    if any(_linears(child) for child in module.children() if linear_site("", child) is None):
        return None
    return _up_and_down(path, linear)


def _up_and_down(path: str, linear: Sequence[Site]) -> Place | None:
    if len(linear) not in (2, 3):
        return None
    *up, down = linear
    d, f = down.d_out, down.d_in
    widths = {(site.d_in, site.d_out) for site in up}
    fused = len(up) == 1 and widths == {(d, 2 * f)}
    return Place(path, d, d) if widths == {(d, f)} or fused else None


def _in_halves(modules: Mapping[str, nn.Module], whole: Mapping[str, Place]) -> Iterator[Place]:
    """Blocks in which two linear layers outside of attention go up and down again, and no module holds just these."""
    taken: set[str] = set(whole)
    for path, module in modules.items():
        if not path.rpartition(".")[2].isdigit() or any(f"{other}.".startswith(f"{path}.") for other in taken):
            continue
        inside = [site for part, site in _linears(module, path) if not _in_attention(modules, path, part)]
        if len(inside) == 2 and _up_and_down(path, inside) is not None:
            first, second = inside
            taken.add(second.path)
            yield Place(second.path, first.d_in, second.d_out, entry=first.path)


def _linears(module: nn.Module, under: str = "") -> list[tuple[str, Site]]:
    found = ((f"{under}.{name}".strip("."), child) for name, child in module.named_modules())
    return [(path, site) for path, child in found if (site := linear_site(path, child)) is not None]


def _in_attention(modules: Mapping[str, nn.Module], block: str, path: str) -> bool:
    parts = path.removeprefix(f"{block}.").split(".")
    above = (".".join([block, *parts[: n + 1]]) for n in range(len(parts)))
    return any(_is_attention(name, modules[name]) for name in above)


def _is_attention(path: str, module: nn.Module) -> bool:
    last = path.rpartition(".")[2]
    return bool(_ATTENTION.search(last) or _ATTENTION.search(type(module).__name__)) and "mlp" not in last.lower()


def _any_module(path: str, module: nn.Module) -> Place:
    site = linear_site(path, module)
    return Place(path, 0, 0) if site is None else Place(path, site.d_in, site.d_out)


def _example(backbone: nn.Module) -> str:
    """A module of the first block, for advice."""
    numbered = [path for path, _ in backbone.named_modules() if re.search(r"\.\d+\.[^.]+$", path)]
    return next((path for path in numbered if "norm" not in path), numbered[0] if numbered else "layers.0")


@dataclass(frozen=True, slots=True)
class _Call:
    """How a layer was called, and what it gave."""

    given: int
    came: Any
    went: Any


def _calls(backbone: nn.Module, found: Mapping[str, Place], inputs: Mapping[str, Any]) -> dict[str, _Call]:
    """The first call of each place, and of its entry."""
    calls: dict[str, _Call] = {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            more = [value for value in (*args[1:], *kwargs.values()) if value is not None]
            calls.setdefault(path, _Call(len(more), args[0] if args else None, output))

        return hook

    paths = {path for place in found.values() for path in (place.path, place.entry) if path}
    hooks = [backbone.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in paths]
    try:
        with eval_mode(backbone):
            backbone(**inputs)
    except Exception:
        return {}  # a foreign model whose inputs were guessed wrongly
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _checked(place: Place, calls: Mapping[str, _Call], *, alone: bool) -> Place:
    call = calls.get(place.path)
    if call is None:
        if not place.d_in:
            raise IncompatibleExpert(
                "TARGET",
                place.path,
                "its widths are not known: the backbone could not be run, or does not call this module. Name another.",
            )
        return place
    came = calls[place.entry].came if place.entry in calls else call.came
    if not isinstance(came, Tensor) or not isinstance(call.went, Tensor) or came.shape[:-1] != call.went.shape[:-1]:
        raise IncompatibleExpert(
            "TARGET",
            place.path,
            f"PEER goes where one tensor comes in and one of as many tokens goes out; this {_shape(came)} -> "
            f"{_shape(call.went)}. Name its feed-forward layer, or another module.",
        )
    if alone and call.given:
        raise IncompatibleExpert(
            "TARGET",
            place.path,
            f"it is called with {call.given} more argument(s) than its input, which experts in its place would ignore. "
            "Use mode='parallel' here, or name a feed-forward layer.",
        )
    return replace(place, d_in=came.shape[-1], d_out=call.went.shape[-1], passed=(came, call.went))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
