"""Linear tasks composed of latent skills: y = x W_t + noise, W_t the mean of a few shared low-rank skills.

A skill is a sum of `skill_rank` outer products a b^T. `column_rank` says how far a and b are from tensor products:
read as a square, each is a matrix of that rank. At 1 every skill is a sum of Kronecker products of vectors (separable),
which one tensor product of leaves can hold; at the square's full rank it is an ordinary low-rank skill.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many of everything. Compositions are all sets of `parts` skills; where there are too few, they repeat.

    `seen`: the held-out tasks are training compositions again, with new examples.
    """

    width: int = 256
    num_skills: int = 6
    skill_rank: int = 2
    parts: tuple[int, ...] = (2, 3)
    train_tasks: int = 24
    held_out_tasks: int = 8
    examples: int = 48
    shots: tuple[int, ...] = (4, 8, 16, 64)
    test_examples: int = 256
    noise: float = 0.05
    seen: bool = False


@dataclass(frozen=True)
class Examples:
    """Inputs and targets `(tasks, examples, width)`; one row of the batch for each task."""

    x: Tensor
    y: Tensor

    def first(self, count: int) -> "Examples":
        """The first `count` of every task."""
        return Examples(self.x[:, :count], self.y[:, :count])


@dataclass(frozen=True)
class Tasks:
    """Tasks with their examples; `test` is seen by the final score alone, `validation` by the choice of settings."""

    compositions: tuple[tuple[int, ...], ...]
    weights: Tensor
    train: Examples
    validation: Examples
    test: Examples


@dataclass(frozen=True)
class World:
    """What the multitask stage learns from, and new compositions of the same skills."""

    train: Tasks
    held_out: Tasks
    shots: tuple[int, ...]


def make_world(seed: int, column_rank: int, size: Size) -> World:
    """Skills, compositions and examples of one seed. Targets have unit power, on average over the training tasks."""
    draw = torch.Generator().manual_seed(seed)
    shape = (size.num_skills, size.skill_rank, size.width)
    a, b = _columns(shape, column_rank, draw), _columns(shape, column_rank, draw)
    skills = torch.einsum("srp,srq->spq", a, b)
    sets = [chosen for parts in size.parts for chosen in combinations(range(size.num_skills), parts)]
    wanted = size.train_tasks + size.held_out_tasks
    order = [at for _ in range(-(-wanted // len(sets))) for at in torch.randperm(len(sets), generator=draw).tolist()]
    compositions = [sets[at] for at in order[:wanted]]
    weights = torch.stack([skills[list(chosen)].mean(0) for chosen in compositions])
    weights = weights / weights[: size.train_tasks].square().sum(1).mean().sqrt()
    cut, first = size.train_tasks, 0 if size.seen else size.train_tasks
    held_out = slice(first, first + size.held_out_tasks)
    return World(
        _tasks(compositions[:cut], weights[:cut], size.examples, size, draw),
        _tasks(compositions[held_out], weights[held_out], max(size.shots), size, draw),
        size.shots,
    )


def _columns(shape: tuple[int, ...], column_rank: int, draw: torch.Generator) -> Tensor:
    """Gaussian columns, or sums of `column_rank` tensor products of two Gaussian leaves."""
    side = math.isqrt(shape[-1])
    if side * side != shape[-1]:
        raise ValueError(f"width={shape[-1]}: expected a square number, so that a column can be a product of two.")
    if column_rank >= side:
        return torch.randn(shape, generator=draw)
    left, right = (torch.randn(*shape[:-1], column_rank, side, generator=draw) for _ in range(2))
    return torch.einsum("srgp,srgq->srpq", left, right).flatten(-2) / math.sqrt(column_rank)


def _tasks(
    compositions: list[tuple[int, ...]], weights: Tensor, examples: int, size: Size, draw: torch.Generator
) -> Tasks:
    def examples_of(count: int) -> Examples:
        x = torch.randn(len(weights), count, size.width, generator=draw)
        y = x @ weights
        return Examples(x, y + size.noise * torch.randn(y.shape, generator=draw))

    return Tasks(tuple(compositions), weights, *(examples_of(n) for n in (examples, 64, size.test_examples)))
