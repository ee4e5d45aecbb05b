"""What a comparison allows one to say: better, worse, or no significant difference.

A hybrid that costs as much as all its components must be told apart from the best of them, and the answer "it can't be"
has to be as easy to give as the other two. Losses are of documents, because tokens of one document are no independent
examples, and pairs, because documents differ more than systems do.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mixwright.evaluation.intervals import RESAMPLES, Interval, interval, resampled_means

Word = Literal["better", "worse", "no significant difference"]
EQUAL_TOKENS, EQUAL_FLOPS = "equal tokens", "equal FLOPs"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One system against a rival under one budget: the paired difference in loss (ours - theirs), and what it says.

    `seeds`: the difference of each run. Better or worse is said only where the interval excludes zero and every run
    lies on the same side of it: an interval over documents says nothing of how far another run would land.
    """

    system: str
    rival: str
    budget: str
    difference: Interval
    seeds: tuple[float, ...]

    @property
    def word(self) -> Word:
        """Better, worse, or no significant difference."""
        if self.difference.high < 0.0 and max(self.seeds) < 0.0:
            return "better"
        if self.difference.low > 0.0 and min(self.seeds) > 0.0:
            return "worse"
        return "no significant difference"

    def sentence(self) -> str:
        """The verdict in words, with the numbers that it rests on."""
        found = self.difference
        numbers = f"{found.value:+.4f} nats per token, 95 % {found.low:+.4f} .. {found.high:+.4f}, {found.n} documents"
        runs = "" if len(self.seeds) == 1 else f", {len(self.seeds)} runs"
        shown = f"{numbers}{runs}"
        if self.word == "no significant difference":
            return f"{self.system}: no significant difference from {self.rival} at {self.budget} ({shown})."
        return f"{self.system} is {self.word} than {self.rival} at {self.budget} ({shown})."

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a record and for a page."""
        return {
            "system": self.system,
            "rival": self.rival,
            "budget": self.budget,
            "verdict": self.word,
            **asdict(self.difference),
            "seeds": list(self.seeds),
            "sentence": self.sentence(),
        }


def verdict(
    ours: Float[Tensor, "*seeds documents"],
    theirs: Float[Tensor, "*seeds documents"],
    *,
    rival: str,
    budget: str = EQUAL_TOKENS,
    system: str = "the hybrid",
    tokens: Float[Tensor, " documents"] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Compare the mean loss (nats per token) of the same documents under two systems, in one run or several.

    With `tokens`, the number of scored tokens of each document, the means are over tokens; without, over documents.
    Documents are drawn again, all runs together: one document is no more evidence for having been read three times.
    """
    if ours.shape != theirs.shape or ours.ndim not in (1, 2) or 0 in ours.shape:
        raise ValueError(
            f"a verdict compares the losses of the same documents; got shapes {tuple(ours.shape)} and "
            f"{tuple(theirs.shape)}, expected twice (documents,) or twice (seeds, documents)."
        )
    gaps = (ours.double() - theirs.double()).reshape(-1, ours.shape[-1])
    if not bool(torch.isfinite(gaps).all()):
        raise ValueError(f"a loss of {system} or of {rival} is not finite: there is nothing to compare.")
    weights = torch.ones(gaps.shape[1], dtype=torch.float64) if tokens is None else tokens.double()
    if weights.shape != gaps.shape[1:] or bool((weights <= 0).any()):
        raise ValueError(
            f"`tokens` counts the scored tokens of each of {gaps.shape[1]} documents, all above 0; got "
            f"{tuple(weights.shape)} with the least {weights.min().item() if weights.numel() else 'missing'}."
        )
    means = resampled_means(torch.stack([(gaps * weights).mean(0), weights]), resamples=resamples, seed=seed)
    by_seed = (gaps * weights).sum(1) / weights.sum()
    found = interval(float(by_seed.mean()), means[:, 0] / means[:, 1], gaps.shape[1])
    return Verdict(system, rival, budget, found, tuple(by_seed.tolist()))


def best_of(losses: Mapping[str, float]) -> str:
    """The system with the least loss. Give it those of a validation part: the best on the test part is chosen by luck
    as well, which the interval knows nothing of."""
    if not losses:
        raise ValueError("the best of no systems was asked for; expected the loss of at least one.")
    return min(losses, key=lambda name: losses[name])
