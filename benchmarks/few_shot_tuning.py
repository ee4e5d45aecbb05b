"""Fine-tuning on a support set: all weights, a few steps, and a learning rate that the support alone chooses."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.few_shot_exam import Embed, Weights
from mixwright.ops.prototypes import class_means, cosine_scores

RATES, STEPS = (0.0, 3e-4, 1e-3), 15

Start = Callable[[Tensor, Tensor], Weights]
"""(frozen features of the support, labels) -> weights to start from."""


def tuned(embed: Embed, start: Start, images: Tensor, labels: Tensor, features: Tensor) -> Weights:
    """The weights after `STEPS` steps of AdamW at the rate with the best loss on the support held out."""
    begun = start(features, labels)
    held = held_out(labels)
    rate = 0.0
    if bool(held.any()):
        losses = [_held_out_loss(embed, trained(embed, begun, images[~held], labels[~held], rate), images, labels, held)
                  for rate in RATES]  # fmt: skip
        rate = RATES[losses.index(min(losses))]
    return trained(embed, begun, images, labels, rate)


def held_out(labels: Tensor) -> Tensor:
    """The last item of every class that has two or more."""
    counts = torch.bincount(labels)
    last = {int(label): place for place, label in enumerate(labels.tolist())}
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[[place for label, place in last.items() if counts[label] > 1]] = True
    return held


def trained(embed: Embed, begun: Weights, images: Tensor, labels: Tensor, rate: float) -> Weights:
    """AdamW on the support's own cross-entropy; prototypes are made anew in each step."""
    if rate == 0.0:
        return begun
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in begun.items()}
    optimiser = torch.optim.AdamW(list(weights.values()), lr=rate, weight_decay=0.0)
    ways = int(labels.max()) + 1
    for _ in range(STEPS):
        moved = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(_))
        prototypes = class_means(embed(images, weights), labels, ways)
        loss = cross_entropy(cosine_scores(embed(moved, weights), prototypes), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


@torch.no_grad()
def _held_out_loss(embed: Embed, weights: Weights, images: Tensor, labels: Tensor, held: Tensor) -> float:
    features = embed(images, weights)
    prototypes = class_means(features[~held], labels[~held], int(labels.max()) + 1)
    return cross_entropy(cosine_scores(features[held], prototypes), labels[held]).item()
