"""What a family of language models can do inside a hybrid, tried on a tiny random model beside a tiny GPT-NeoX.

Each check returns why it does not hold, in a sentence, or None. What the model does wrong by itself is told apart from
what it does wrong in a hybrid.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mixwright.backbones.prune import pruned
from mixwright.backbones.tiny import tiny_backbone
from mixwright.errors import IncompatibleExpert
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.model import HybridModel, compose

NUM_BLOCKS = 2
_LENGTH, _PADDING, _TOLERANCE = 10, 2, 1e-4
_CACHES = ("past_key_values", "cache_params")


@dataclass
class Bench:
    """A hybrid of the model on trial and a partner, and the tokens that all checks read."""

    component: nn.Module
    hybrid: HybridModel = field(init=False)
    ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = self.component.get_output_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
        partner = tiny_backbone("gpt_neox", vocab_size=int(rows), seed=1)
        config = ManticoreConfig(
            num_blocks=NUM_BLOCKS, projectors="identity", names=("family", "partner"), vocab_size=int(rows)
        )
        self.hybrid = compose(config, [self.component, partner]).eval()
        self.hybrid.requires_grad_(True)
        self.hybrid.backbone.generation_config.eos_token_id = None
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(8, self.hybrid.backbone.vocab_size, (2, _LENGTH), generator=generator)

    def alone(self, ids: Tensor | None = None, **options: Any) -> Tensor:
        """The component's own logits, in the columns of the hybrid."""
        takes = inspect.signature(self.component.forward).parameters
        given = {"use_cache": False, **options}
        logits = self.component(
            self.ids if ids is None else ids, **{k: v for k, v in given.items() if k in takes}
        ).logits
        return logits[..., : self.hybrid.backbone.vocab_size]


def identity(bench: Bench) -> str | None:
    """One-hot mixture weights give the component's own logits, to the last bit."""
    with torch.no_grad():
        mine = bench.alone()
        strays = _difference(mine, bench.alone())
        if strays:
            return f"two calls of its own forward on the same tokens differ by {strays:.1g}"
        before = bench.hybrid.mixture_weights
        bench.hybrid.mixture_weights = [[1.0, 0.0]] * NUM_BLOCKS
        strays = _difference(bench.hybrid(bench.ids).logits, mine)
        bench.hybrid.mixture_weights = before
    return f"alone in a hybrid its logits differ from its own by {strays:.1g}" if strays else None


def backward(bench: Bench) -> str | None:
    """In a soft hybrid every weight that gets a gradient alone gets one."""
    params = dict(bench.component.named_parameters())
    logits = bench.alone()
    cross_entropy(logits[:, :-1].flatten(0, 1), bench.ids[:, 1:].flatten()).backward()
    wanted = {name for name, value in params.items() if value.grad is not None}
    bench.hybrid.zero_grad(set_to_none=True)
    bench.hybrid(bench.ids, labels=bench.ids).loss.backward()
    missing = sorted(name for name in wanted if params[name].grad is None)
    broken = next((n for n, v in params.items() if v.grad is not None and not torch.isfinite(v.grad).all()), None)
    bench.hybrid.zero_grad(set_to_none=True)
    if missing:
        return f"{len(missing)} of its {len(wanted)} trained weights get no gradient in a hybrid, first {missing[0]}"
    return f"the gradient of {broken} is not finite" if broken else None


@torch.no_grad()
def decoding(bench: Bench) -> str | None:
    """Step by step with caches, a hybrid gives the logits of the whole sequence at once."""
    if bench.hybrid.backbone.uncached() is not None:
        return "it has no cache of the kind that transformers passes on, so a hybrid with it decodes without one"
    whole = bench.hybrid(bench.ids).logits
    strays = _difference(_stepwise(bench.hybrid, bench.ids, "past_key_values"), whole)
    if strays <= _TOLERANCE * _size(whole):
        return None
    own = _own_decoding(bench.component, bench.ids)
    return f"cached decoding differs from the whole forward by {strays:.1g} ({own})"


@torch.no_grad()
def generate(bench: Bench) -> str | None:
    """Greedy, with three beams and sampling: the same tokens with caches and without."""
    model, prompt = bench.hybrid, bench.ids[:, :6]
    cached = model.backbone.uncached() is None
    ways: Mapping[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True}}
    common: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    for way, options in ways.items():
        found: list[Tensor] = []
        for use_cache in (False, cached):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.append(model.generate(prompt, use_cache=use_cache, **{"do_sample": False, **common, **options}))
        if found[0].shape != found[1].shape or not torch.equal(found[0], found[1]):
            return f"{way}: other tokens with a cache than without"
        if way == "greedy" and not torch.equal(found[0], _greedy(model, prompt, 4)):
            return "greedy: other tokens than the arg max of its own logits"
    return None


@torch.no_grad()
def padding(bench: Bench) -> str | None:
    """Padding on the left changes no logits of the tokens that follow."""
    ids, mask = bench.ids, torch.ones_like(bench.ids)
    mask[0, :_PADDING] = 0
    plain = bench.hybrid(ids[:1, _PADDING:]).logits
    strays = _difference(bench.hybrid(ids, attention_mask=mask).logits[:1, _PADDING:], plain)
    if strays <= _TOLERANCE * _size(plain):
        return None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    own = _tried(
        lambda: _difference(
            bench.alone(ids, attention_mask=mask, position_ids=positions)[:1, _PADDING:],
            bench.alone(ids[:1, _PADDING:]),
        )
    )
    return f"padding on the left changes logits by {strays:.1g} ({own})"


def checkpointing(bench: Bench) -> str | None:
    """With gradient checkpointing layers are computed twice, and loss and gradients stay."""
    if not getattr(bench.component, "supports_gradient_checkpointing", False):
        return "its class supports no gradient checkpointing"
    parts = bench.hybrid.backbone.parts[0]
    layer = bench.component.get_submodule(f"{parts.layers}.0")
    runs: list[int] = []
    inside = [module for module in layer.modules() if module is not layer]

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        runs.append(1)

    hooks = [module.register_forward_pre_hook(count) for module in inside]
    bench.hybrid.train()
    try:
        plain = _gradients(bench)
        once = len(runs)
        bench.hybrid.backbone.gradient_checkpointing_enable()
        again = _gradients(bench)
        twice = len(runs) - once
    finally:
        for hook in hooks:
            hook.remove()
        bench.hybrid.backbone.gradient_checkpointing_disable()
        bench.hybrid.eval()
    if twice <= once:
        return "it is switched on, but no layer is computed again in backward"
    strays = max(_difference(a, b) for a, b in zip(plain, again, strict=True))
    return f"gradients change by {strays:.1g}" if strays > _TOLERANCE else None


@torch.no_grad()
def pruning(bench: Bench) -> str | None:
    """Each block's run of layers can stand alone, as a model that decodes like its own forward."""
    for run in bench.hybrid.backbone.runs[0]:
        try:
            small = pruned(bench.component, list(run))
        except IncompatibleExpert as error:
            return error.message.split(". Keep other")[0]
        takes = inspect.signature(small.forward).parameters
        cache = next((name for name in _CACHES if name in takes), None)
        if cache is None:
            small(bench.ids)
            continue
        whole = small(bench.ids, use_cache=False).logits
        strays = _difference(_stepwise(small, bench.ids, cache), whole)
        if strays > _TOLERANCE * _size(whole):
            own = _own_decoding(bench.component, bench.ids)
            return f"layers {run[0]} to {run[-1]} alone: cached decoding strays by {strays:.1g} ({own})"
    return None


CHECKS: Mapping[str, Callable[[Bench], str | None]] = {
    check.__name__: check
    for check in (identity, backward, decoding, generate, padding, checkpointing, pruning)  # in this order
}
"""Name of a check -> the check."""
ESSENTIAL = ("identity", "backward")
"""Without these a family is of no use in a hybrid."""


def _stepwise(model: Any, ids: Tensor, name: str) -> Tensor:
    cache, rows = None, []
    for t in range(ids.shape[1]):
        output = model(ids[:, t : t + 1], use_cache=True, **({} if cache is None else {name: cache}))
        cache = getattr(output, name)
        rows.append(output.logits)
    return torch.cat(rows, 1)


def _own_decoding(component: nn.Module, ids: Tensor) -> str:
    name = next((name for name in _CACHES if name in inspect.signature(component.forward).parameters), "")
    return _tried(lambda: _difference(_stepwise(component, ids, name), component(ids, use_cache=False).logits))


def _tried(measure: Callable[[], float]) -> str:
    try:
        return f"the model alone: {measure():.1g}"
    except Exception as error:  # a foreign model, outside of what it was made for
        return f"the model alone can't: {' '.join(str(error).split())[:80]}"


def _greedy(model: HybridModel, prompt: Tensor, count: int) -> Tensor:
    for _ in range(count):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    return prompt


def _gradients(bench: Bench) -> list[Tensor]:
    """Loss and gradients of one training step, with the dropout of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = bench.hybrid(bench.ids, labels=bench.ids).loss
        loss.backward()
    found = [loss.detach(), *_given(value.grad for value in bench.component.parameters())]
    bench.hybrid.zero_grad(set_to_none=True)
    return found


def _given(gradients: Iterable[Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients if gradient is not None]


def _difference(one: Tensor, two: Tensor) -> float:
    if one.shape != two.shape:
        return float("inf")
    apart = (one.float() - two.float()).abs()
    return float(apart.max()) if torch.isfinite(apart).all() else float("inf")


def _size(logits: Tensor) -> float:
    return max(1.0, float(logits.abs().max()))
