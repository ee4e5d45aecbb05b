"""Mixture weights of a hybrid's slot: one for each component, learned, drawn or set."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routers.base import AbstractRouter
from mixwright.routers.remembered import version
from mixwright.routing import Condition, Routing

Draw = Literal["none", "gumbel", "dirichlet"]
FLOOR = 1e-5
"""The weight of a component that was set to 0 and is allowed again."""


class MixtureWeights(AbstractRouter):
    """alpha = softmax(a / tau) over the components that are allowed; the others have exactly 0, one alone exactly 1.

    `logits` a and `temperature` tau stay float32 in a model that is cast to less. `draw`, in training only and once in
    a pass, however many slots share the row: `gumbel`, alpha = softmax((a + g) / tau) (DASH, Shen et al. 2022);
    `dirichlet`, alpha ~ Dirichlet(M softmax(a / tau) / tau) with its pathwise gradient (after DrNAS, Chen et al. 2021,
    who have Dirichlet(elu(a) + 1)): M allowed components begin at Dirichlet(1, ..., 1) as theirs do, and the mean is
    what evaluation, `weights` and `set` say. `anneal` (first, last): the temperature falls geometrically between them
    with the training's `progress`.
    """

    def __init__(self, num_models: int, *, draw: Draw = "none", anneal: tuple[float, float] | None = None) -> None:
        super().__init__()
        if anneal is not None and min(anneal) <= 0:
            raise ValueError(f"anneal={anneal}: expected two temperatures over 0, the first and the last.")
        self.num_experts = num_models
        self.draw: Draw = draw
        self.anneal = anneal
        self.logits = nn.Parameter(torch.zeros(num_models))
        self.register_buffer("allowed", torch.ones(num_models, dtype=torch.bool))
        self.register_buffer("temperature", torch.tensor(1.0 if anneal is None else anneal[0]))
        self.allowed: Tensor
        self.temperature: Tensor
        self._forget()

    @property
    def progress(self) -> float | None:
        """The share of the training that is done: told by the loop, and kept only in the temperature."""
        return None

    @progress.setter
    def progress(self, share: float) -> None:
        if self.anneal is not None:
            first, last = self.anneal
            self.temperature.fill_(first * (last / first) ** share)

    def weights(self) -> Float[Tensor, " models"]:
        """alpha as in evaluation, of every component, float32."""
        return (self._wide() / self.temperature).masked_fill(~self.allowed, -torch.inf).softmax(-1)

    @torch.no_grad()
    def set(self, weights: Float[Tensor, " models"]) -> None:
        """These weights from now on; zeros are exact. Raises ValueError for what is no point of the simplex."""
        given = weights.detach().double().cpu()
        if given.shape != (self.num_experts,) or not bool((given >= 0).all()) or abs(float(given.sum()) - 1) > 1e-4:
            raise ValueError(
                f"mixture weights {given.tolist()}: expected {self.num_experts} numbers of at least 0 that sum to 1."
            )
        self.allowed.copy_(given > 0)
        kept = torch.where(given > 0, given.clamp_min(torch.finfo(torch.float32).tiny), FLOOR)
        self.logits.copy_(kept.log() * self.temperature.double().cpu())

    def forward(self, x: Tensor, condition: Condition) -> Routing:
        """One choice for the whole model; the same object again where nothing has changed since the last call."""
        del x
        logits: Any = self._parameters["logits"]
        learned = torch.is_grad_enabled() and logits.requires_grad
        if not learned and (same := self.fixed()) is not None:
            return same
        ids, _ = self.live()
        if len(ids) > 1 and (learned or self.is_drawing):
            return Routing(self.relaxed(self.live_logits(condition), condition), self.num_experts, ids)
        with torch.inference_mode(False), torch.no_grad():
            found = Routing(self.relaxed(self.live_logits(condition), condition), self.num_experts, ids)
        self._routing = (self._state(), found)
        return found

    def fixed(self) -> Routing | None:
        """What the last pass had, if the next one without gradients has it too: nothing has changed or is drawn."""
        if self._routing is None or self.training and self.draw != "none":
            return None
        key, found = self._routing
        return found if key is not None and key == self._state() else None

    def settled(self) -> Routing | None:
        """The routing where one component is allowed alone, whose weight is then 1."""
        ids, beside = self.live()
        if self._alone is None or self._alone[0] is not ids:
            with torch.inference_mode(False):
                one = torch.ones(1, device=beside.device)
                self._alone = (ids, Routing(one, self.num_experts, ids) if len(ids) == 1 else None)
        return self._alone[1]

    @property
    def is_drawing(self) -> bool:
        """Whether the weights of the next pass are random."""
        return self.training and self.draw != "none" and len(self.live()[0]) > 1

    def live(self) -> tuple[Tensor, Tensor]:
        """The ids of the components that are allowed: on the CPU, where experts read them, and beside the logits."""
        key = (version(self.allowed), self.allowed.data_ptr())
        if self._live is None or self._live[0] != key or None in key:
            with torch.inference_mode(False):
                ids = self.allowed.nonzero().flatten()
                if not len(ids):
                    raise ValueError(f"none of {self.num_experts} components is allowed; allow one of them at least.")
                self._live = (key, ids.cpu(), ids)
        return self._live[1], self._live[2]

    def live_logits(self, condition: Condition) -> Float[Tensor, " live"]:
        """a of the components that are allowed, with this pass's Gumbel noise where some is drawn."""
        logits = self._wide()[self.live()[1]]
        if not self.is_drawing or self.draw != "gumbel":
            return logits
        return logits + self._once("gumbel", condition, lambda: _gumbel(logits))

    def relaxed(self, logits: Float[Tensor, "*decision live"], condition: Condition) -> Float[Tensor, "*decision live"]:
        """The weights that these logits stand for, softmax(logits / tau), or this pass's draw around them."""
        weights = (logits / self.temperature).softmax(-1)
        if not self.is_drawing or self.draw != "dirichlet":
            return weights
        concentration = logits.shape[-1] * weights / self.temperature
        return self._once("dirichlet", condition, lambda: _dirichlet(concentration))

    def _once(self, what: str, condition: Condition, make: Callable[[], Tensor]) -> Tensor:
        """What is drawn in a pass is drawn once: embedding, gates, mixture and head agree."""
        memory = condition.memory
        if memory is None:
            return make()
        if not memory.is_open:
            raise ValueError(
                f"mixture weights with draw={self.draw} were asked for after their pass was over, and would draw "
                "again. Checkpoint the components (gradient_checkpointing_enable), not the slots between them."
            )
        name = f"{what}/{id(self)}"
        if name not in memory.shared:
            memory.shared[name] = make()
        return memory.shared[name]

    def _wide(self) -> Tensor:
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    def _state(self) -> tuple[int, ...] | None:
        """Changes with whatever the weights are made of; None where that can't be told."""
        buffers = self._buffers  # looked up here: the long way takes longer than the rest of a pass's bookkeeping
        logits: Any = self._parameters["logits"]
        allowed: Any = buffers["allowed"]
        temperature: Any = buffers["temperature"]
        if logits.is_inference() or allowed.is_inference() or temperature.is_inference():
            return None
        return (
            logits._version, logits.data_ptr(), allowed._version, allowed.data_ptr(), temperature._version,
            temperature.data_ptr(),
        )  # fmt: skip

    def _forget(self) -> None:
        self._routing: tuple[Any, Routing] | None = None
        self._live: tuple[Any, Tensor, Tensor] | None = None
        self._alone: tuple[Tensor, Routing | None] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixtureWeights":
        """As nn.Module's, but a cast to less than float32 moves logits and temperature without rounding them."""
        wide, temperature = self.logits.data, self.temperature
        super()._apply(fn, recurse)
        if self.logits.dtype.itemsize < min(4, wide.dtype.itemsize):
            self.logits.data = wide.to(self.logits.device)
        self.temperature = temperature.to(self.temperature.device)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routing": None, "_live": None, "_alone": None}


def _gumbel(like: Tensor) -> Tensor:
    uniform = torch.rand_like(like).clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)
    return -(-uniform.log()).log()


def _dirichlet(concentration: Tensor) -> Tensor:
    """A point of the simplex that no component leaves for good: concentrations too small to draw from are raised."""
    return torch.distributions.Dirichlet(concentration.clamp_min(1e-3), validate_args=False).rsample()
