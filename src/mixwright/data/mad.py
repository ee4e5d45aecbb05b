"""MAD as it is run: the settings that it begins with, the hardest ones, and the batches of a task."""

from collections.abc import Mapping, Sequence

import torch

from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.data.mad_tasks import (
    Compression,
    FuzzyRecall,
    InContextRecall,
    MadExamples,
    MadTask,
    Memorisation,
    SelectiveCopy,
    Split,
)

EASY: Mapping[str, MadTask] = {
    task.name: task
    for task in (
        InContextRecall(),
        FuzzyRecall(),
        InContextRecall(vocab_size=32, noise_tokens=16, noise=0.2),
        SelectiveCopy(),
        Memorisation(),
        Compression(),
    )
}
"""The settings that MAD begins with."""

HARDEST: Mapping[str, MadTask] = {
    task.name: task
    for task in (
        InContextRecall(vocab_size=128, num_train=800),
        FuzzyRecall(vocab_size=128, num_train=800),
        InContextRecall(vocab_size=144, noise_tokens=16, noise=0.8, num_train=800),
        SelectiveCopy(vocab_size=128, copied=96, num_train=800),
        Memorisation(vocab_size=8192),
    )
}
"""The settings of Manticore's table, without compression, which needs a decoder of its own."""

SMALL: Mapping[str, MadTask] = {
    task.name: task
    for task in (
        SelectiveCopy(16, 32, 5),
        InContextRecall(16, 32),
        InContextRecall(24, 32, noise_tokens=8, noise=0.3),
        FuzzyRecall(16, 32, 2),
        Memorisation(4096, 4, num_train=12_800),
    )
}
"""Short sequences on which models of some 60,000 parameters differ after a few hundred steps of 32 examples."""


def mad_batches(
    task: MadTask, *, batch_size: int, seed: int, split: Split = "train", count: int | None = None
) -> Batches:
    """The batches in which a causal model learns `task`, over `count` examples (default: those of its training set).

    Raises ValueError for compression.
    """
    examples = task.sample(task.num_train if count is None else count, seed, split)
    examples.causal()  # refuses here what no batch could hold
    rows = [examples[at : at + 1] for at in range(len(examples))]
    digest = f"{task} {seed} {split} {len(rows)}"
    return Batches(rows, _collate, batch_size=batch_size, seed=seed, digest=digest)


def _collate(rows: Sequence[MadExamples]) -> Batch:
    return MadExamples(torch.cat([row.tokens for row in rows]), torch.cat([row.targets for row in rows])).causal()
