"""How sure a few-shot classifier may be, judged on its own support: each item by prototypes that have not seen it."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixwright.ops.prototypes import SCALE, Centre, centres, cosine_scores

_SCALES = tuple(10 ** (exponent / 8) for exponent in range(25))  # 1 to 1000


@dataclass(frozen=True)
class HeldOut:
    """Cosines of support items to prototypes made without them, and their labels; no rows where none can be spared."""

    cosines: Float[Tensor, "items ways"]
    labels: Int[Tensor, " items"]

    def is_finite(self) -> bool:
        """Whether every cosine is a number."""
        return bool(self.cosines.isfinite().all())

    def scale(self, default: float = SCALE) -> float:
        """What cosines are best multiplied with before the softmax: least loss, among 1 to 1000.

        One item more is counted as `default` would have it, with which few items end; it is `default` without items.
        """
        if not len(self.labels):
            return default
        known = [float(cross_entropy(scale * self.cosines, self.labels, reduction="sum")) for scale in _SCALES]
        prior = [abs(math.log(scale / default)) for scale in _SCALES]
        return min(zip(_SCALES, known, prior), key=lambda row: row[1] + row[2])[0]

    def accuracy(self) -> float:
        """The share that is recognised; NaN without items, 0 where features are not finite."""
        if not self.is_finite():
            return 0.0
        return float((self.cosines.argmax(-1) == self.labels).double().mean())

    def loss(self, scale: float = SCALE) -> float:
        """The mean loss; NaN without items, infinite where features are not finite."""
        return math.inf if not self.is_finite() else float(cross_entropy(scale * self.cosines, self.labels))

    def confidence(self, scale: float) -> tuple[Float[Tensor, " items"], Bool[Tensor, " items"]]:
        """How sure of each item, and whether rightly."""
        sure, chosen = (scale * self.cosines).softmax(-1).max(-1)
        return sure, chosen == self.labels

    def threshold(self, scale: float, max_error: float) -> float:
        """The least confidence at which to answer, so that wrong answers are at most this share of all questions.

        (wrong answers + 1) / (items + 1) <= max_error: conformal risk control (Angelopoulos et al. 2024). Infinite
        where the items are too few to promise that.
        """
        sure, right = self.confidence(scale)
        wrong = sure[~right].sort(descending=True).values
        allowed = math.floor(max_error * (len(sure) + 1) - 1 + 1e-9)
        if allowed < 0:
            return math.inf
        if len(wrong) <= allowed:
            return 0.0
        return float(torch.nextafter(wrong[allowed], wrong.new_tensor(math.inf)))

    def nearness(self, share: float) -> float:
        """The cosine to its own class that all but this share of the items reach: below it, it is none of these."""
        own = self.cosines.gather(1, self.labels[:, None])[:, 0].sort().values
        return -1.0 if not len(own) else float(own[min(int(share * len(own)), len(own) - 1)])


def leave_one_out(
    features: Float[Tensor, "shots width"], labels: Int[Tensor, " shots"], ways: int, centre: Centre = "mean"
) -> HeldOut:
    """Each item against prototypes made of the others; an item that is alone in its class is passed over."""
    kept = [i for i in range(len(labels)) if int((labels == labels[i]).sum()) > 1]
    rows: list[Tensor] = []
    whole = centres(features, labels, ways, centre)
    for i in kept:
        others = torch.arange(len(labels), device=labels.device) != i
        own = others & (labels == labels[i])
        prototypes = whole.clone()
        prototypes[labels[i]] = centres(features[own], torch.zeros_like(labels[own]), 1, centre)[0]
        rows.append(cosine_scores(features[i : i + 1], prototypes, 1.0))
    cosines = torch.cat(rows) if rows else features.new_zeros(0, ways).float()
    return HeldOut(cosines, labels[torch.tensor(kept, dtype=torch.long, device=labels.device)])
