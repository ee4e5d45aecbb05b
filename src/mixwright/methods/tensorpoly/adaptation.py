"""What adapting to a new task compared, chose and did."""

import math
from dataclasses import dataclass
from typing import Literal

What = Literal["all", "router", "experts"]
Start = Literal["fresh", "mean", "source", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to adapt, and what it came to on shots that it had not seen: the loss per target of every fold."""

    what: What
    start: Start
    losses: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Over the folds; infinite where training failed in one."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the folds."""
        squares = sum((loss - self.mean) ** 2 for loss in self.losses)
        return math.sqrt(squares / (len(self.losses) - 1)) if len(self.losses) > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.what} from {self.start}"


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What `adapt` did. `candidates`: all that k-fold validation compared, in order; empty where nothing was open."""

    task: str
    what: What
    start: Start
    source: str | None
    """The task whose row the new one started from."""
    candidates: tuple[Candidate, ...]
    shots: int
    steps: int
    loss: float
    """Per target, over all shots, after training on them: no estimate of anything."""
    seconds: float
    trained: int
    """Numbers that learned."""

    def __str__(self) -> str:
        start = f"the row of {self.source!r}" if self.source is not None else f"a {self.start} row"
        lines = [
            f"{self.task}: trained {self.what} ({self.trained:,} numbers) from {start} on {self.shots} shots, "
            f"{self.steps} steps, {self.seconds:.1f} s; loss on these shots {self.loss:.4f}"
        ]
        for one in sorted(self.candidates, key=lambda c: c.mean):
            lines.append(f"  {one!s:22} {one.mean:.4f} (spread {one.spread:.4f} over {len(one.losses)} folds)")
        return "\n".join(lines)
