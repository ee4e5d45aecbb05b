"""What a model was worth, beside the pretrained one, on domains held out of its meta-training: kept with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixwright.composition.seen_tasks import as_tensor, words_in

NAMES, NUMBERS = "measured.names", "measured.numbers"


@dataclass(frozen=True)
class MeasuredDomain:
    """Accuracy over the same episodes of one domain, without a gradient step; `half_width`: half the 95 % interval of
    the mean paired difference, 0 where there is but one episode."""

    name: str
    pretrained: float
    adapted: float
    half_width: float
    episodes: int

    @property
    def difference(self) -> float:
        """Adapted minus pretrained: below 0 the domain is lost."""
        return self.adapted - self.pretrained


def measured_tensors(domains: Sequence[MeasuredDomain]) -> dict[str, Tensor]:
    """For `ComposedModel.whole`."""
    rows = [[one.pretrained, one.adapted, one.half_width, one.episodes] for one in domains]
    return {NAMES: as_tensor(one.name for one in domains), NUMBERS: torch.tensor(rows, dtype=torch.float64)}


def measured_in(whole: Mapping[str, Tensor]) -> tuple[MeasuredDomain, ...]:
    """What `measured_tensors` wrote, the worst difference first; nothing where nothing was."""
    if NAMES not in whole:
        return ()
    rows = zip(words_in(whole[NAMES]), whole[NUMBERS].tolist(), strict=True)
    found = [MeasuredDomain(name, before, after, half, int(count)) for name, (before, after, half, count) in rows]
    return tuple(sorted(found, key=lambda one: one.difference))


def lost_sentences(domains: Sequence[MeasuredDomain]) -> list[str]:
    """Where it is worse than the pretrained model, in words; nothing where nothing was measured."""
    if not domains:
        return []
    lost = [one for one in domains if one.difference < 0]
    whole = f"{len(domains)} held-out domain{'s' * (len(domains) > 1)}"
    if not lost:
        return [f"On none of {whole} was it worse than the pretrained model."]
    named = ", ".join(
        f"{one.name} ({100 * one.difference:+.1f} \u00b1 {100 * one.half_width:.1f} points)" for one in lost
    )
    return [f"On {len(lost)} of {whole} it was worse than the pretrained model: {named}."]
