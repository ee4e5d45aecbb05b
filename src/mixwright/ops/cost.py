"""What the paths of `ops/accumulate.py` cost, as a formula: the choice depends on shapes only, never on a clock.

The constants were measured by `benchmarks/dispatch_paths.py`, which prints prediction beside measurement.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Microseconds on one Zen 4 core, float32, torch 2.13, with factors that are not in a cache; only ratios matter."""

    each_once: float = 150.0
    """What `add_each` does whatever the size: reading indices and weights."""
    assignment_each: float = 5.0
    """Two matrix-vector products and what calls them, for one token and one expert."""
    grouped_once: float = 300.0
    """What `add_grouped` does whatever the size: sorting, gathering and adding."""
    expert_grouped: float = 9.5
    """Two matrix products and what calls them, for one expert."""
    assignment_grouped: float = 0.6
    """One row gathered, multiplied and added."""
    megabyte: float = 57.0
    """Reading 2**20 bytes of factors from memory."""


MEASURED = Costs()


def expected_chosen(assignments: int, experts: int) -> float:
    """How many of `experts` are chosen at least once by that many independent even choices: E (1 - (1 - 1/E)^n)."""
    return experts * (1.0 - (1.0 - 1.0 / experts) ** assignments)


def microseconds_each(tokens: int, k: int, *, rank: int, width: int, costs: Costs = MEASURED) -> float:
    """Of `add_each`; `width` is d_in + d_out."""
    reading = costs.megabyte * 4 * rank * width / 2**20
    return costs.each_once + tokens * k * (costs.assignment_each + reading)


def microseconds_grouped(tokens: int, k: int, *, experts: int, rank: int, width: int, costs: Costs = MEASURED) -> float:
    """Of `add_grouped`; `width` is d_in + d_out."""
    chosen = expected_chosen(tokens * k, experts)
    reading = costs.megabyte * 4 * rank * width / 2**20
    return costs.grouped_once + chosen * (costs.expert_grouped + reading) + tokens * k * costs.assignment_grouped


def cheaper_one_by_one(tokens: int, k: int, *, experts: int, rank: int, width: int) -> bool:
    """Whether `add_each` is the cheaper path for these shapes."""
    each = microseconds_each(tokens, k, rank=rank, width=width)
    return each <= microseconds_grouped(tokens, k, experts=experts, rank=rank, width=width)
