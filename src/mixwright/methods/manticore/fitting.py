"""Projectors fitted by least squares to a few thousand tokens, before anything is trained (ours; see README).

A hybrid with weights strictly between 0 and 1 destroys its components until its projectors have learned: each reads a
mixture that none of them has ever seen. Both directions have closed forms. Let b_m be what component m hands over at a
boundary when it runs alone.

*Out of a block.* The stream is h = sum_m alpha_m z_m, and z_m depends on y_m alone, so that the most a stream of D
channels can carry of all b_m together are the D first principal components of (b_1, ..., b_M), each component scaled to
the same variance. They are turned to lie near sum_m alpha_m pad(b_m), so that a gate that moves later finds each
component's channels roughly in their place. T_m being the part of that map for component m, Wout_m is fitted so that
z_m comes to T_m b_m / alpha_m. After the last block there is no Win: heads read the stream as it is. There T maps to
the vector whose mixed heads say what the ensemble of the components' logits says, as nearly as D channels can.

*Into a block.* Win_m is fitted so that x_m comes to b_m, given the stream that really arrives.

Both fits go block by block, on what the blocks before them, fitted already, hand over. The gate is part of the model:
z_m = pad(y_m) + (1 - alpha_m) (Wout_m - pad)(y_m), so what is fitted is the difference from identity, and the ridge
holds it there. Components that act alone are left out, as their projectors are.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.eval_mode import eval_mode
from mixwright.composition.listening import Hear, listening
from mixwright.data.collate import Batch
from mixwright.experts.blocks import BlockExperts
from mixwright.experts.projectors import resized
from mixwright.methods.manticore.model import EMBEDDING, HybridModel
from mixwright.ops.ridge import ridge, shared_axes

_GATE = 0.1
"""The least share of the gate that a fit may count on: a projector behind a closed one would have no bounds."""


class Supply(Protocol):
    """What gives batches by number, such as `data.batches.Batches`."""

    def batch(self, index: int) -> Batch:
        """Batch `index` of an endless order."""
        ...


@torch.no_grad()
def fit_projectors(
    model: HybridModel, batches: Supply, *, tokens: int = 4096, strength: float = 1e-2
) -> dict[str, tuple[float, float]]:
    """Fit every projector of a hybrid of affine ones to `tokens` tokens, at its present mixture weights.

    Returns, for each, what share of the variance of its target was missed by identity and is missed now. Raises
    ValueError for projectors that are not affine.
    """
    fit = _Fit(model, _inputs(model, batches, tokens), strength)
    with eval_mode(model):
        fit.listen_alone()
        for k in range(model.backbone.num_blocks):
            fit.block(k)
    return fit.missed


def _inputs(model: HybridModel, batches: Supply, tokens: int) -> list[Mapping[str, Any]]:
    device, found, count = next(model.parameters()).device, list[Mapping[str, Any]](), 0
    while count < tokens:
        inputs = batches.batch(len(found)).to(device).inputs
        count += int(_mask(inputs).sum())
        found.append(inputs)
    return found


class _Fit:
    def __init__(self, model: HybridModel, inputs: Sequence[Mapping[str, Any]], strength: float) -> None:
        self.model, self.inputs, self.strength = model, inputs, strength
        self.width = model.backbone.width
        self.rows = model.mixture_weights.double().cpu()
        self.own: list[list[Tensor]] = []
        self.missed: dict[str, tuple[float, float]] = {}

    def listen_alone(self) -> None:
        """b_m of every boundary, for every component: `own[m][k]`, `(tokens, d_m)`, what enters block k."""
        slots = (EMBEDDING, *(f"blocks.{k}" for k in range(self.model.backbone.num_blocks)))
        for m, name in enumerate(self.model.experts):
            with self.model.only(name):
                self.own.append([said[m] for said in self._heard(*slots)])

    def block(self, k: int) -> None:
        """Fit the way into block k, then the way out of it."""
        experts = cast(BlockExperts, self.model.mixtures[f"blocks.{k}"].experts)
        alpha = self.rows[k]
        live = [m for m in range(len(alpha)) if 0 < alpha[m] < 1]
        if not live:
            return
        stream = self._stream(k)
        for m in live:
            target = self.own[m][k].double()
            self._fit(f"blocks.{k}.enter.{m}", experts.enter[m], stream, target, float(alpha[m]))
        (said,) = self._heard(f"blocks.{k}")
        last = k + 1 == self.model.backbone.num_blocks
        shares = self._to_heads(live) if last else self._to_stream(k + 1, live)
        means = [self.own[m][k + 1].double().mean(0) for m in live]
        kept = shares if last else [alpha[m] * _padding(self.width, mean) for m, mean in zip(live, means)]
        offset = torch.stack([part @ mean for part, mean in zip(kept, means)]).sum(0)
        for m, share, mean in zip(live, shares, means):
            target = (self.own[m][k + 1].double() - mean) @ share.T / alpha[m] + offset
            self._fit(f"blocks.{k}.leave.{m}", experts.leave[m], said[m], target, float(alpha[m]))

    def _fit(self, name: str, projector: nn.Module, x: Tensor, target: Tensor, alpha: float) -> None:
        if not isinstance(projector, nn.Linear):
            raise ValueError(
                f"{name} is {type(projector).__name__}: least squares fits affine projectors; compose with "
                "projectors=least_squares, identity or linear."
            )
        x = x.double()
        lacking = target - resized(x, target.shape[-1])
        weight, bias = ridge(x, lacking, self.strength)
        spread = float((target - target.mean(0)).square().sum()) or 1.0
        left = lacking - x @ weight.T - bias
        self.missed[name] = (float(lacking.square().sum()) / spread, float(left.square().sum()) / spread)
        gate = max(1.0 - alpha, _GATE)
        identity = torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device)
        projector.weight.copy_(identity + weight / gate)
        projector.bias.copy_(bias / gate)

    def _to_stream(self, boundary: int, live: Sequence[int]) -> list[Float[Tensor, "width d_m"]]:
        """T_m: principal components of all that the components say, near their weighted sum."""
        alpha = self.rows[boundary - 1]
        said = [self.own[m][boundary].double() for m in live]
        scales = [(b - b.mean(0)).square().mean().sqrt().clamp_min(1e-12) for b in said]
        both = torch.cat([(b - b.mean(0)) / s for b, s in zip(said, scales)], -1)
        natural = [alpha[m] * s * _padding(self.width, b) for m, s, b in zip(live, scales, said)]
        axes = shared_axes(both.T @ both / len(both), torch.cat(natural, -1))
        parts = axes.split([b.shape[-1] for b in said], -1)
        return [part / s for part, s in zip(parts, scales)]

    def _to_heads(self, live: Sequence[int]) -> list[Float[Tensor, "width d_m"]]:
        """T_m = H^+ beta_m H_m: H the mixed heads, and beta the weights of the ensemble, those of the last block.

        Logits count up to a constant, so heads are centred over the vocabulary.
        """
        reading, beta = self.model.head_weights.double().cpu(), self.rows[-1]
        heads = [self._head(m) for m in range(len(reading))]
        mixed = sum(float(w) * resized(head, self.width) for w, head in zip(reading, heads))
        assert isinstance(mixed, Tensor)
        gram = mixed.T @ mixed
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        return [torch.linalg.solve(gram, mixed.T @ (float(beta[m]) * heads[m])) for m in live]

    def _head(self, m: int) -> Float[Tensor, "vocab d_m"]:
        backbone = self.model.backbone
        head = self.model.components[m].get_submodule(backbone.parts[m].head)
        weight = cast(Tensor, head.weight)[: backbone.vocab_size].double()
        return resized(weight - weight.mean(0), backbone.widths[m])

    def _stream(self, k: int) -> Float[Tensor, "tokens width"]:
        """What comes to block k."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(resized(args[0], self.width))

        handle = self.model.mixtures[f"blocks.{k}"].register_forward_pre_hook(catch)
        try:
            self._run()
        finally:
            handle.remove()
        return self._real(caught)

    def _heard(self, *slots: str) -> list[dict[int, Tensor]]:
        """What each component that acts there says at these slots, `(tokens, d_m)`."""
        said: list[dict[int, list[Tensor]]] = [{} for _ in slots]
        with ExitStack() as stack:
            for slot, heard in zip(slots, said):
                stack.enter_context(listening(self.model.mixtures[slot], _into(heard)))
            self._run()
        return [{m: self._real(parts) for m, parts in heard.items()} for heard in said]

    def _run(self) -> None:
        for inputs in self.inputs:
            self.model(**inputs, use_cache=False)

    def _real(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part[_mask(inputs)] for part, inputs in zip(parts, self.inputs, strict=True)])


def _into(said: dict[int, list[Tensor]]) -> Hear:
    return lambda component, _, out: said.setdefault(component, []).append(out)


def _padding(width: int, b: Tensor) -> Tensor:
    """The matrix that pads a vector of `b`'s width."""
    return torch.eye(width, b.shape[-1], dtype=b.dtype, device=b.device)


def _mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
