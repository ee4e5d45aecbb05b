"""Which experts a reader should meet first."""

from mixwright.evaluation.explain import Explanation


def by_prominence(explanation: Explanation) -> list[str]:
    """The experts that lead a token or act on one: those that lead most first, then by contribution."""
    acting = dict.fromkeys(explanation.experts, 0.0)
    for token in explanation.tokens:
        for one in token.experts:
            acting[one.expert] += one.contribution
    led = {expert: explanation.led(expert) for expert in explanation.experts}
    ranked = sorted(explanation.experts, key=lambda expert: (-led[expert], -acting[expert]))
    return [expert for expert in ranked if led[expert] or acting[expert] > 0]
