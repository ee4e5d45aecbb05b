"""What each stage of Manticore must show before the next builds on it."""

from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.losses import Reference
from mixwright.training.gates import Gate

_UNMEASURED = "there is no data.validation to measure on."


def at_most(name: str, measured: float | None, bound: float | None, what: str, than: str) -> Gate:
    """`what` <= `than`."""
    if measured is None or bound is None:
        return Gate(
            name=name, passed=None, measured=measured, bound=bound, said=f"{what} against {than}: {_UNMEASURED}"
        )
    passed = measured <= bound
    sign = "<=" if passed else ">"
    said = f"{what} {measured:.4f} {sign} {bound:.4f}, {than}."
    return Gate(name=name, passed=passed, measured=measured, bound=bound, said=said)


def align_gates(loss: float | None, others: Reference | None, config: ManticoreConfig) -> tuple[Gate, ...]:
    """Aligned is: no worse than the best component by more than the tolerance."""
    best = None if others is None else others.alone[others.best]
    bound = None if best is None else best + config.align_tolerance
    name = "the best component" if others is None else others.best
    than = f"the loss of {name} alone + {config.align_tolerance:g} (config.align_tolerance)"
    return (at_most("aligned", loss, bound, "held-out loss of the aligned hybrid", than),)


def search_gates(loss: float | None, others: Reference | None) -> tuple[Gate, ...]:
    """The search found something where its hybrid beats the components as they came, and the mean of their logits."""
    what = "held-out loss of the searched hybrid"
    best = None if others is None else others.alone[others.best]
    name = "the best component" if others is None else others.best
    ensemble = None if others is None else others.ensemble
    return (
        at_most("beats_best_component", loss, best, what, f"the loss of {name} as it came"),
        at_most("beats_ensemble", loss, ensemble, what, "the loss of the components' mean logits"),
    )


def discretise_gates(loss: float | None, soft: float | None, config: ManticoreConfig) -> tuple[Gate, ...]:
    """Little was lost by keeping one component per block."""
    bound = None if soft is None else soft + config.discretise_tolerance
    than = f"the soft hybrid's + {config.discretise_tolerance:g} (config.discretise_tolerance)"
    return (at_most("discretised", loss, bound, "held-out loss of the discretised hybrid", than),)
