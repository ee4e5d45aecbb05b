"""Which experts a reader should meet first."""

from mixwright.evaluation.explain import Explanation

LISTED = 12


def by_prominence(explanation: Explanation) -> list[str]:
    """The experts that have any weight on this text: those that lead most tokens first, then by contribution."""
    weight, added = (_sums(rows) for rows in (explanation.weight_by_depth, explanation.contribution_by_depth))
    led = {expert: explanation.led(expert) for expert in explanation.experts}
    order = sorted(range(len(led)), key=lambda at: (-led[explanation.experts[at]], -added[at], -weight[at], at))
    return [explanation.experts[at] for at in order if weight[at] > 0]


def _sums(rows: list[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]
