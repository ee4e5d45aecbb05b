"""What a page says of a hybrid, in sentences. Each holds a number that was measured, or says that none was."""

from collections.abc import Iterator, Sequence

from mixwright.evaluation.hybrid import HybridExplanation, Measured
from mixwright.evaluation.hybrid_counterfactuals import ENSEMBLE, Counterfactual
from mixwright.evaluation.hybrid_rows import Row
from mixwright.evaluation.hybrid_sweep import Flatness, Sweep
from mixwright.evaluation.intervals import Interval

FLAT = 0.01
"""Nats per token within which a stretch of weights is called as good as the best."""

GLOSSARY = (
    ("Loss", "how surprised a model is by the next token, on average, in nats: lower is better. One nat less means "
     "that the right token was thought e = 2.7 times as likely."),
    ("Component", "one of the pretrained models that the hybrid is made of."),
    ("Block", "a stretch of the hybrid: every component gives a run of consecutive layers to it."),
    ("Mixture weight", "how much of a component's output goes into the hybrid there. The weights of a row sum to 1."),
    ("Row", "the mixture weights of one place: embedding, a block, or head. Places may share a row."),
    ("Embedding, head", "where tokens become numbers, and where numbers become a guess at the next token."),
    ("Projector", "a small learned map that translates between components where one hands over to another."),
    ("One-hot", "a row in which one component has weight 1: the others do not run there."),
    ("Logit ensemble", "all components run side by side and their outputs are averaged: as dear as the hybrid, nothing "
     "to learn. A hybrid that does not beat it is not worth its trouble."),
    ("95 % interval", "where the difference would fall, 19 times in 20, had other documents of the same kind been "
     "drawn. It says nothing of another training run."),
    ("No significant difference", "the interval holds 0: these texts can't tell the two apart."),
    ("Counterfactual", "the same model with one weight changed and nothing trained again."),
)  # fmt: skip


def slot_name(slot: str) -> str:
    """A slot as people count: `blocks.1` is Block 2."""
    if slot.startswith("blocks.") and slot.removeprefix("blocks.").isdigit():
        return f"Block {int(slot.removeprefix('blocks.')) + 1}"
    return slot.capitalize()


def row_name(row: Row) -> str:
    """The places that follow a row: `Embedding and block 1`."""
    names = [slot_name(slot) for slot in row.slots]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}".capitalize()


def verdict_sentences(found: HybridExplanation) -> list[str]:
    """What the hybrid is beside the best of its components and their ensemble; comparisons of elsewhere first."""
    said = [_elsewhere(one) for one in found.verdicts]
    hybrid, best = (found.systems[0] if found.systems else None), found.best
    if hybrid is None or best is None or found.texts is None:
        return said or ["No text was given, so nothing here says whether the hybrid is any good."]
    many = len(found.components) > 1
    rival = f"the best of its components, {best.system}" if many else f"its only component, {best.system}"
    said.append(_beside(rival, hybrid.loss, best))
    alone = _only(found)
    if alone is not None and many:
        said.append(f"Every row gives all the weight to {alone}: this hybrid is that component.")
    ensemble = found.system(ENSEMBLE)
    if ensemble is not None:
        said.append(_beside("the logit ensemble of its components, which costs about as much", hybrid.loss, ensemble))
    return said


def _beside(rival: str, loss: float, other: Measured) -> str:
    """The verdict first, then the numbers that it rests on."""
    assert other.against is not None
    gap = other.against.difference
    word = {"better": "The hybrid is better than", "worse": "The hybrid is worse than"}.get(
        other.against.word, "No significant difference between the hybrid and"
    )
    numbers = f"{loss:.3f} nats per token against {other.loss:.3f}"
    if gap.value == gap.low == gap.high == 0:
        return f"{word} {rival}: {numbers}, the same on every text."
    spread = f"95 % interval {signed(gap.low)} to {signed(gap.high)}, {gap.n:,} texts"
    if gap.n < 2:
        spread = "one text, which is too few for an interval"
    return f"{word} {rival}: {numbers} (difference {signed(gap.value)}, {spread})."


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, a real minus, and no sign where nothing is left of it."""
    shown = f"{value:+.{digits}f}"
    return shown[1:] if float(shown) == 0 else shown.replace("-", "\u2212")


def _elsewhere(one: dict[str, object]) -> str:
    """A comparison made elsewhere, from its fields, so that nothing but numbers and names is taken over."""
    keys = ("system", "rival", "budget", "verdict", "value", "low", "high", "n")
    system, rival, budget, word, *numbers, n = (one.get(key) for key in keys)
    value, low, high = (float(number) if isinstance(number, int | float) else float("nan") for number in numbers)
    runs = one.get("seeds")
    seeds = f", {len(runs)} training runs" if isinstance(runs, Sequence) and len(runs) > 1 else ""
    is_what = f"no significant difference from {rival}" if str(word).startswith("no ") else f"{word} than {rival}"
    run = f", run {one['run']}" if one.get("run") else ""
    begin = f"At {budget}, {system}: {is_what}"
    spread = f"95 % interval {signed(low)} to {signed(high)}"
    return f"{begin} ({signed(value)} nats per token, {spread}, {n} texts{seeds}{run})."


def _only(found: HybridExplanation) -> str | None:
    """The component that has all the weight everywhere, if one has."""
    leaders = {row.leader for row in found.rows}
    if len(leaders) == 1 and all(row.spread is None and max(row.weights) == 1.0 for row in found.rows):
        return found.components[leaders.pop()].name
    return None


def amount(gap: Interval) -> str:
    """The size of a change with its interval, unsigned where both ends agree."""
    if gap.low <= 0.0 <= gap.high:
        return f"{signed(gap.value)} nats per token, 95 % interval {signed(gap.low)} to {signed(gap.high)}"
    low, high = sorted((abs(gap.low), abs(gap.high)))
    return f"{abs(gap.value):.3f} nats per token, 95 % interval {low:.3f} to {high:.3f}"


def reasons(found: HybridExplanation) -> list[tuple[str, str]]:
    """(kind, sentence) for every row and component, rows in order, the largest effect first: needs, hurts, or even."""
    said: list[tuple[str, str]] = []
    for row in found.rows:
        own = [c for c in found.counterfactuals if c.row == row.name]
        ranked = sorted((c for c in own if c.forced == "0"), key=lambda c: -abs(c.change.value))
        for one in ranked:
            said += _reason(row_name(row), one, own)
    return said


def _reason(place: str, without: Counterfactual, own: Sequence[Counterfactual]) -> Iterator[tuple[str, str]]:
    name = without.component
    if without.kept:
        everything = next(c for c in own if c.component == name and c.forced == "1")
        change = everything.change
        if change.excludes_zero():
            verb = "cost" if change.value > 0 else "save"
            kind = "needs" if change.value > 0 else "hurts"
            yield kind, f"{place} does not use {name}: to use nothing else there would {verb} {amount(change)}."
        else:
            yield "even", f"{place} does not use {name}, and to use nothing else changes little: {amount(change)}."
        return
    change = without.change
    if change.low > 0:
        yield "needs", f"{place} needs {name}: without it the loss rises by {amount(change)}."
    elif change.high < 0:
        yield "hurts", f"{place} would do better without {name}: the loss falls by {amount(change)}."
    else:
        yield "even", f"{place}: without {name} the loss does not change measurably ({amount(change)})."


def left_out_sentences(found: HybridExplanation) -> list[str]:
    """What each component is worth over all rows."""
    return [
        f"Without {one.component} in any row the loss "
        + (
            f"does not change measurably ({amount(one.change)})."
            if not one.change.excludes_zero()
            else f"{'rises' if one.change.value > 0 else 'falls'} by {amount(one.change)}, to {one.loss:.3f}."
        )
        for one in found.left_out
    ]


def sweep_sentence(one: Sweep, place: str) -> str:
    """Where the best weight lies, how far the choice is from it, and how wide the valley is."""
    best = one.losses[one.best]
    gap = one.chosen_loss - best
    good = [w for w, loss in zip(one.weights, one.losses) if loss <= best + FLAT]
    wide = (
        f"only that point is within {FLAT} nats of it"
        if len(good) == 1
        else f"weights from {good[0]:.1f} to {good[-1]:.1f} are within {FLAT} nats of it"
        if len(good) == round((good[-1] - good[0]) * (len(one.weights) - 1)) + 1
        else f"{len(good)} of the {len(one.weights)} points are within {FLAT} nats of it"
    )
    apart = "level with it" if abs(gap) < 0.0005 else f"{abs(gap):.3f} nats {'above' if gap > 0 else 'below'} it"
    return (
        f"{place}: of {len(one.weights)} weights of {one.component}, {one.weights[one.best]:.1f} is best "
        f"(loss {best:.3f}); {wide}. The choice, {one.chosen:.2f}, is {apart}."
    )


def flatness_sentences(flat: Flatness) -> list[str]:
    """What the Hessian over the mixture logits says."""
    top, least = flat.eigenvalues[0], flat.eigenvalues[-1]
    said = [
        f"Over the mixture logits of {len(flat.rows)} rows the loss bends most with {top:.4f} nats per squared logit "
        f"(the top eigenvalue of its Hessian, on {flat.tokens:,} tokens) and least with {least:.4f}; its slope there "
        f"is {flat.gradient:.4f}."
    ]
    half = top / 2
    if top > 0:
        said.append(f"One step of length 1 along the steepest bend costs about {half:.4f} nats.")
    if least < -1e-4:
        said.append("An eigenvalue below 0: the choice is no minimum on these texts; somewhere near is better.")
    return said
