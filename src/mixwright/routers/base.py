"""What every router, and every way of scoring experts, promises."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.routing import Condition, Routing


class AbstractRouter(nn.Module, ABC):
    """Maps a hidden state and what the caller knows to a `Routing` among `num_experts` experts."""

    num_experts: int

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch d_in"], condition: Condition) -> Routing:
        """The routing of this pass; its decision axes broadcast against those of `x`."""

    def settled(self) -> Routing | None:
        """The routing, where one expert acts alone whatever the input is, of kinds that can know."""

    def fixed(self) -> Routing | None:
        """The routing of a pass without gradients, where that is known before the input is, of kinds that can know."""


class WideBuffers(nn.Module):
    """Its buffers stay float32 when the model around them is cast to something narrower: what was measured or
    decomposed in full precision is not rounded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WideBuffers":
        """As nn.Module's, but a cast to a narrower type moves the buffers without rounding them."""
        wide = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype.itemsize < wide[name].dtype.itemsize:
                setattr(self, name, wide[name].to(buffer.device))
        return self


class AbstractScores(WideBuffers, ABC):
    """Scores every expert for every token: higher is better, before any normalising. Always float32, and that holds
    under autocast too."""

    num_experts: int

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch experts"]:
        """One score for each expert."""
