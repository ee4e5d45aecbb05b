"""The cells of the pretrained comparison: each measures one thing, whole, and is kept in a file of JSON lines.

A seed decides the windows of training and the projectors' initial values; the pretrained pair is the same for all.
"""

import copy
from functools import partial
from typing import Any

import torch

from benchmarks.cells import Cells
from benchmarks.hybrid_pretrained_pair import NAMES
from benchmarks.hybrid_pretrained_search import RATE, SEARCHES, rows_of
from benchmarks.hybrid_pretrained_systems import (
    LogitEnsemble,
    Shape,
    Workshop,
    components_of,
    equal_flops,
    projectors_of,
    set_weights,
    slopes_of,
)
from benchmarks.hybrid_pretrained_texts import BATCH, GENERAL, TARGETS, Batches
from benchmarks.hybrid_pretrained_training import Spent, document_losses, forward_flops, size_of, step_flops, train

TUNING_SEED, SWEPT = 1000, "shakespeare"
EPOCH = "shakespeare, an epoch"
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
KINDS = ("none", "linear", "identity", "least_squares", "mlp")
POINTS = tuple(round(0.1 * i, 1) for i in range(11))
MAIN = (Shape(), Shape(blocks=2))


def run(cells: Cells, shop: Workshop, seeds: int) -> None:
    """Everything, what matters most first."""
    shop.with_rates(chosen_rates(cells, shop))
    for corpus in (*TARGETS, GENERAL):
        cells.take(f"untouched {corpus}", partial(untouched, shop, corpus))
    for seed in range(min(seeds, 2)):
        for corpus in TARGETS:
            main_table(cells, shop, corpus, seed)
    for seed in range(seeds):
        others(cells, shop, seed)
        if seed == 0:
            for later in range(2, seeds):
                for corpus in TARGETS:
                    main_table(cells, shop, corpus, later)
            main_table(cells, shop.for_an_epoch(), SWEPT, 0, EPOCH, MAIN[:1])


def others(cells: Cells, shop: Workshop, seed: int) -> None:
    """What explains the main table: sweep and searches, projectors, a mix of the targets."""
    sweep(cells, shop, seed)
    corpus = TARGETS[1]  # the one on which the rows of a block and of its embedding disagree
    name = f"{MAIN[0]}: {corpus} seed {seed}"
    if f"hybrid {name}" in cells.found:
        weights = cells.found[f"hybrid {name}"]["weights"]
        cells.take(f"cut along blocks {name}", partial(cut_along_blocks, shop, MAIN[0], corpus, seed, weights))
    ablation(cells, shop, seed)
    cells.take(f"mix seed {seed}", partial(mix, shop, seed))


def chosen_rates(cells: Cells, shop: Workshop) -> dict[str, float]:
    """The learning rate of each kind of system: on a seed that is not reported, by the search part's loss."""
    chosen: dict[str, float] = {}
    for system in (*NAMES, "ensemble", "hybrid"):
        losses = {
            rate: cells.take(f"rate {system} {rate:g}", partial(_rate, shop, system, rate))["loss"] for rate in RATES
        }
        chosen[system] = min(losses, key=lambda rate: losses[rate])
    return chosen


def _rate(shop: Workshop, system: str, rate: float) -> dict[str, Any]:
    windows, spent = shop.windows(SWEPT, "train", TUNING_SEED), Spent()
    steps = max(2, shop.budget.tune // 2)
    if system == "hybrid":
        model, _ = shop.align(Shape(), TUNING_SEED)
        trained = [*components_of(model), *projectors_of(model)]
    elif system == "ensemble":
        model = LogitEnsemble([shop.component(name) for name in NAMES])
        trained = list(model.parameters())
    else:
        model = shop.component(system)
        trained = list(model.parameters())
    train(model, trained, windows, steps, rate, spent)
    return {"loss": float(document_losses(model, shop.texts.parts[SWEPT]["search"].windows(3)).mean())}


def untouched(shop: Workshop, corpus: str) -> dict[str, Any]:
    """Components and their even logit ensemble as they are, and an even hybrid before anything is fitted to text."""
    part = shop.texts.parts[corpus]["test"].windows()
    models = {**shop.pair, "ensemble": LogitEnsemble(list(shop.pair.values()))}
    found: dict[str, Any] = {name: document_losses(model, part).tolist() for name, model in models.items()}
    for kind in (kind for kind in KINDS if kind != "least_squares"):
        found[f"hybrid {kind}"] = document_losses(shop.hybrid(Shape(projectors=kind), 0), part).tolist()
    found["forward_flops"] = {name: forward_flops(model) for name, model in shop.pair.items()}
    found["parameters"] = {name: size_of(model) for name, model in shop.pair.items()}
    return found


def main_table(
    cells: Cells, shop: Workshop, corpus: str, seed: int, label: str | None = None, shapes: tuple[Shape, ...] = MAIN
) -> None:
    """One seed on one corpus: hybrids, their components on as many tokens and as many FLOPs, the ensembles."""
    name = f"{label or corpus} seed {seed}"
    cells.take(f"components, equal tokens: {name}", partial(components, shop, corpus, seed))
    whole = cells.take(f"hybrid {shapes[0]}: {name}", partial(hybrid, shop, shapes[0], corpus, seed))
    for component in NAMES:
        flops = whole["hybrid"]["train_flops"] + whole["align"]["flops"]
        steps = equal_flops(flops, _step_flops(shop.component(component)))
        cells.take(f"{component}, equal FLOPs: {name}", partial(longer, shop, component, corpus, seed, steps))
        alike = partial(longer, shop, component, corpus, seed, shop.budget.tune)
        cells.take(f"{component}, equal tuning: {name}", alike)
    cells.take(f"ensemble: {name}", partial(ensemble, shop, corpus, seed))
    cells.take(f"uniform {shapes[0]}: {name}", partial(uniform, shop, shapes[0], corpus, seed))
    for shape in shapes[1:]:
        cells.take(f"hybrid {shape}: {name}", partial(hybrid, shop, shape, corpus, seed))


def _step_flops(model: torch.nn.Module) -> float:
    return step_flops(model, list(model.parameters()))


def components(shop: Workshop, corpus: str, seed: int) -> dict[str, Any]:
    """Both alone on the hybrid's tokens, and their logits mixed with a weight chosen on the search part."""
    found: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name in NAMES:
        models[name], spent = shop.component(name), Spent()
        windows = shop.windows(corpus, "train", seed)
        train(models[name], models[name].parameters(), windows, shop.budget.target, shop.rates[name], spent)
        found[name] = shop.measured(models[name], corpus, spent)
    part = shop.texts.parts[corpus]["search"].windows(3)
    losses = {
        point: float(document_losses(LogitEnsemble(list(models.values()), [point, 1 - point]), part).mean())
        for point in POINTS
    }
    best = min(losses, key=lambda point: losses[point])
    mixed = LogitEnsemble(list(models.values()), [best, 1 - best])
    both = Spent(
        shop.budget.target,
        sum(found[name]["train_flops"] for name in NAMES),
        sum(found[name]["cpu_seconds"] for name in NAMES),
    )
    found["ensemble apart"] = shop.measured(mixed, corpus, both, weights=[best, 1 - best])
    return found


def longer(shop: Workshop, component: str, corpus: str, seed: int, steps: int) -> dict[str, Any]:
    """One alone for so many steps."""
    model, spent = shop.component(component), Spent()
    train(model, model.parameters(), shop.windows(corpus, "train", seed), steps, shop.rates[component], spent)
    return shop.measured(model, corpus, spent)


def ensemble(shop: Workshop, corpus: str, seed: int) -> dict[str, Any]:
    """Both, trained together through their mixed logits, the weight learnt with them."""
    model, spent = LogitEnsemble([shop.component(name) for name in NAMES]), Spent()
    windows = shop.windows(corpus, "train", seed)
    train(model, model.parameters(), windows, shop.budget.target, shop.rates["ensemble"], spent)
    return shop.measured(model, corpus, spent, weights=model.weights.softmax(-1).tolist())


def hybrid(shop: Workshop, shape: Shape, corpus: str, seed: int) -> dict[str, Any]:
    """Align, search, rewind and tune; then cut to one component per slot, as it is and tuned again."""
    spent = Spent()
    _, aligned = shop.align(shape, seed)
    weights = shop.searched(shape, seed, corpus, "darts", spent)
    model = shop.tuned(shape, seed, corpus, weights, shop.budget.tune, spent)
    found: dict[str, Any] = {"align": aligned, "weights": weights}
    found["hybrid"] = shop.measured(model, corpus, spent)
    return {**found, **cut_down(shop, model, cut(weights), corpus, seed, spent)}


def cut_down(shop: Workshop, model: Any, path: dict[str, Any], corpus: str, seed: int, spent: Spent) -> dict[str, Any]:
    """A tuned hybrid with one component in every slot, as it is and tuned again."""
    set_weights(model, path)
    found = {"cut": shop.measured(model, corpus, spent)}
    chosen = [*components_of(model), *projectors_of(model)]
    windows, first = shop.windows(corpus, "train", seed), shop.budget.target
    train(model, chosen, windows, shop.budget.retune, shop.rates["hybrid"] / 2, spent, first=first)
    return {**found, "cut and tuned again": shop.measured(model, corpus, spent)}


def cut_along_blocks(shop: Workshop, shape: Shape, corpus: str, seed: int, weights: dict[str, Any]) -> dict[str, Any]:
    """The same hybrid cut so that the first block's component embeds and the last one's reads out, whatever the rows
    of embedding and head say."""
    spent = Spent(steps=shop.budget.search)
    model = shop.tuned(shape, seed, corpus, weights, shop.budget.tune, spent)
    return cut_down(shop, model, {"blocks": cut(weights)["blocks"]}, corpus, seed, spent)


def cut(weights: dict[str, Any]) -> dict[str, Any]:
    """All weight to the largest, slot by slot."""

    def largest(row: list[float]) -> list[float]:
        best = row.index(max(row))
        return [float(m == best) for m in range(len(row))]

    blocks = [largest(row) for row in weights["blocks"]]
    return {"blocks": blocks, "embedding": largest(weights["embedding"]), "head": largest(weights["head"])}


def uniform(shop: Workshop, shape: Shape, corpus: str, seed: int) -> dict[str, Any]:
    """Even mixture weights, no search: all tokens go to tuning."""
    spent = Spent()
    return shop.measured(shop.tuned(shape, seed, corpus, None, shop.budget.target, spent), corpus, spent)


def sweep(cells: Cells, shop: Workshop, seed: int) -> None:
    """Eleven mixture weights with one row for all slots, and what each search finds, tuned alike."""
    shape = Shape(rows="block")
    for point in POINTS:
        weights = {"blocks": [[point, 1 - point]]}
        cells.take(f"sweep {point:g} seed {seed}", partial(_swept, shop, shape, seed, weights))
    for kind in SEARCHES:
        found = cells.take(f"search {kind} seed {seed}", partial(_searched, shop, shape, seed, kind))
        weights = {"blocks": found["blocks"]}
        cells.take(f"searched {kind} seed {seed}", partial(_swept, shop, shape, seed, weights))


def _swept(shop: Workshop, shape: Shape, seed: int, weights: dict[str, Any]) -> dict[str, Any]:
    spent = Spent()
    model = shop.tuned(shape, seed, SWEPT, weights, shop.budget.tune // 2, spent)
    return shop.measured(model, SWEPT, spent, weights=weights["blocks"])


def _searched(shop: Workshop, shape: Shape, seed: int, kind: Any) -> dict[str, Any]:
    spent = Spent()
    return {**shop.searched(shape, seed, SWEPT, kind, spent), "cpu_seconds": spent.seconds}


def ablation(cells: Cells, shop: Workshop, seed: int) -> None:
    """Kinds of projectors: the general loss before and after alignment, and the target's after tuning, even weights."""
    for kind in KINDS:
        cells.take(f"projectors {kind} seed {seed}", partial(_projected, shop, Shape(projectors=kind), seed))


def _projected(shop: Workshop, shape: Shape, seed: int) -> dict[str, Any]:
    _, aligned = shop.align(shape, seed)
    spent = Spent()
    model = shop.tuned(shape, seed, SWEPT, None, shop.budget.tune // 2, spent)
    return {**shop.measured(model, SWEPT, spent), "align": aligned}


def mix(shop: Workshop, seed: int) -> dict[str, Any]:
    """Two specialists, each tuned on one target, on half of each: who keeps both skills?

    Frozen with static and with input-dependent weights, where only projectors and mixture weights learn; and, on as
    many tokens, each specialist tuned, and both tuned through their mixed logits.
    """
    specialists: dict[str, Any] = {}
    for name, corpus in zip(NAMES, TARGETS, strict=True):
        specialists[name] = shop.component(name)
        windows = shop.windows(corpus, "train", seed)
        train(specialists[name], specialists[name].parameters(), windows, shop.budget.target, shop.rates[name], Spent())
    halves = [Batches(shop.texts.parts[c]["train"].stream, seed + 501, BATCH // 2) for c in TARGETS]
    steps = shop.budget.tune

    def mixed(step: int) -> torch.Tensor:
        return torch.cat([half(step) for half in halves])

    found: dict[str, Any] = {}

    def note(name: str, model: Any, **more: Any) -> None:
        losses = {c: document_losses(model, shop.texts.parts[c]["test"].windows()).tolist() for c in TARGETS}
        found[name] = {**losses, **more}

    for name, model in specialists.items():
        note(f"{name}, untouched", model)
    note("ensemble, even", LogitEnsemble(list(specialists.values())))
    for weights in ("static", "sequence", "token"):
        model = shop.hybrid(Shape(weights=weights), seed, [copy.deepcopy(m) for m in specialists.values()])
        spent, rows = Spent(), rows_of(model)
        adam = torch.optim.Adam(rows, lr=RATE)
        learnt = [*projectors_of(model), *slopes_of(model)]
        train(model, learnt, mixed, steps, shop.rates["align"], spent, each=lambda _, a=adam: a.step(), also=rows)
        learns = sum(p.numel() for p in (*learnt, *rows))
        note(f"hybrid, frozen, {weights}", model, weights=model.mixture_weights.tolist(), learns=learns)
    for name in NAMES:
        model = copy.deepcopy(specialists[name])
        train(model, model.parameters(), mixed, steps, shop.rates[name] / 2, Spent())
        note(f"{name}, tuned", model)
    model = LogitEnsemble([copy.deepcopy(m) for m in specialists.values()])
    train(model, model.parameters(), mixed, steps, shop.rates["ensemble"] / 2, Spent())
    note("ensemble, tuned", model, weights=model.weights.softmax(-1).tolist())
    return found


def quick_texts(shop: Workshop) -> None:
    """A walk through everything: two documents for each test."""
    for corpus in shop.texts.parts.values():
        for part in corpus.values():
            part.documents[:] = part.documents[:4]
    torch.manual_seed(0)
