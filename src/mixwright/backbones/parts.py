"""Where a causal language model of any family can be cut: its layers and its head, found without naming families.

The layers are the shallowest list of as many modules as the config counts layers. A pass over two tokens then shows
that each is entered once and in order, how wide the hidden state is there, and that the head is called: a model for
which that does not hold is refused, with what was seen.
"""

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mixwright.backbones.eval_mode import eval_mode
from mixwright.errors import IncompatibleExpert

_CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What has to be known of a model to suspend its forward between layers.

    `layers`, `embedding`, `head`: paths of modules. `widths`: of the hidden state that enters each layer and, last, the
    head. `takes`: names of the arguments of its forward; `cache_name`, that of its cache, None for a model that takes
    none of today's caches. `vocab_size`: the rows of its head.
    """

    layers: str
    embedding: str
    head: str
    widths: tuple[int, ...]
    takes: frozenset[str]
    cache_name: str | None
    vocab_size: int

    @property
    def num_layers(self) -> int:
        """How many layers there are to be cut between."""
        return len(self.widths) - 1

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        """Layer number `index` of `model`."""
        return model.get_submodule(f"{self.layers}.{index}")


def split(num_layers: int, num_blocks: int) -> tuple[range, ...]:
    """Layers `round(i L / K)` to `round((i + 1) L / K)` for each block i: each once, lengths differing by at most 1.

    Raises ValueError where a block would have no layer.
    """
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_blocks={num_blocks}: expected 1 to {num_layers}, the layers of the shallowest component; each block "
            "needs a layer of each."
        )
    cuts = [(2 * i * num_layers + num_blocks) // (2 * num_blocks) for i in range(num_blocks + 1)]
    return tuple(range(a, b) for a, b in zip(cuts, cuts[1:]))


def runs_of(layers: Sequence[int]) -> tuple[range, ...]:
    """The runs of so many layers each, one after the other; a run of none is empty."""
    ends = list(accumulate(layers, initial=0))
    return tuple(range(a, b) for a, b in zip(ends, ends[1:]))


def parts_of(model: nn.Module, name: str = "") -> Parts:
    """Look at `model`, a causal language model of transformers, and run it once on two tokens; `name` is for errors.

    Raises IncompatibleExpert (CUT) for a model that can't be suspended between its layers.
    """
    name = name or type(model).__name__
    paths = {id(module): path for path, module in model.named_modules()}
    layers = _layers(model, name)
    embedding, head = (_asked(model, f"get_{side}_embeddings", name) for side in ("input", "output"))
    takes = frozenset(inspect.signature(model.forward).parameters)
    seen = _look(model, layers, head, takes, name)
    vocab_size = getattr(head, "out_features", None) or seen.logits
    return Parts(
        layers=paths[id(layers)],
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        widths=tuple(width for _, width in seen.entered),
        takes=takes,
        cache_name=_cache_name(model, takes),
        vocab_size=int(vocab_size),
    )


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The hidden state among the arguments of a layer, and its name if it was given by name."""
    if args:
        return args[0], None
    if "hidden_states" in kwargs:
        return kwargs["hidden_states"], "hidden_states"
    found = next((key for key, value in kwargs.items() if isinstance(value, Tensor) and value.dim() == 3), None)
    return (None, None) if found is None else (kwargs[found], found)


def refused(name: str, reason: str) -> IncompatibleExpert:
    """The error for a model that can't be a component."""
    return IncompatibleExpert(
        "CUT", name, f"{reason} It can't be a component of a hybrid; `mixwright probe` shows which families can."
    )


def _cache_name(model: nn.Module, takes: frozenset[str]) -> str | None:
    supports: Any = getattr(model, "_supports_default_dynamic_cache", lambda: False)
    return next((name for name in _CACHES if name in takes and supports()), None)


@dataclass
class _Seen:
    entered: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    shapes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    logits: int = 0


def _layers(model: nn.Module, name: str) -> nn.ModuleList:
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", lambda: config)
    count = getattr(find(), "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise refused(name, "it is an encoder-decoder, and has no single stream from embedding to head.")
    if not isinstance(count, int):
        raise refused(name, "its config does not say how many layers it has (num_hidden_layers).")
    waiting: deque[nn.Module] = deque([model])
    while waiting:
        module = waiting.popleft()
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
        waiting.extend(module.children())
    raise refused(name, f"it has no list of its {count} layers.")


def _asked(model: nn.Module, method: str, name: str) -> nn.Module:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, nn.Module):
        raise refused(name, f"{method}() gives no module; expected a causal language model with a head of its own.")
    return found


def _look(model: nn.Module, layers: nn.ModuleList, head: nn.Module, takes: frozenset[str], name: str) -> _Seen:
    seen = _Seen()
    expected = list(range(len(layers) + 1))
    anchor = next(model.parameters())
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.arange(2, device=anchor.device).remainder(rows).unsqueeze(0)
    options = {"use_cache": False} if "use_cache" in takes else {}

    def recorder(place: int) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_of(args, kwargs)[0]
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else ()
            seen.entered.append((place, shape[-1] if shape else 0))
            seen.shapes.append(shape)

        return record

    with ExitStack() as hooks, eval_mode(model):
        for place, module in enumerate((*layers, head)):
            hooks.callback(module.register_forward_pre_hook(recorder(place), with_kwargs=True).remove)
        try:
            output = model(input_ids=ids, **options)
        except Exception as error:  # a foreign model
            raise refused(name, f"its own forward fails on two tokens ({_short(error)}).") from error
    strange = next((shape for shape in seen.shapes if len(shape) != 3 or shape[:2] != (1, 2)), None)
    if strange is not None:
        raise refused(
            name, f"its layers do not hand on one stream of shape (batch, seq, width): two tokens came as {strange}."
        )
    if [place for place, _ in seen.entered] != expected:
        ran = ", ".join("head" if place == len(layers) else str(place) for place, _ in seen.entered)
        raise refused(name, f"its {len(layers)} layers and head are not entered once each and in order, but: {ran}.")
    seen.logits = int(output.logits.shape[-1])
    return seen


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
