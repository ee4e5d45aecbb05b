"""What a stage came to."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """`loss`: the last step's, per target; `best`: (step, held-out loss) of the weights kept, and `held_out` the loss
    of each task under them. `said`: what the stage says of itself, in words."""

    steps: int
    loss: float | None
    best: tuple[int, float] | None
    seconds: float
    losses: tuple[float, ...] = ()
    held_out: Mapping[str, float] = field(default_factory=dict[str, float])
    said: str = ""
    predicted: float | None = None
    """Seconds that the first twenty steps let expect; None for fewer."""
