"""The demo's table: every system on the same mixed documents."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mixwright.catalog.store import Catalog
from mixwright.composition.model import ComposedModel
from mixwright.demo.corpus import Domain
from mixwright.demo.mixed import MixedDocuments, own_domain, uniform
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.systems import (
    Sharing,
    System,
    arrow,
    backbone,
    composed,
    parameter_average,
    scored,
    single_experts,
)
from mixwright.evaluation.table import BEST_SINGLE, ORACLE, Table
from mixwright.routers.signature import SignatureScores

TOP_K = 2
MERGED = "merged experts"
TUNED = "merged experts, best of 3 strengths"
ROUTED = "PHATGOOSE, top 2, as published"
POOLED = "PHATGOOSE with pooled scores"
SIGNED = "signatures with pooled scores"
POOLING = 0.8


def compare(model: ComposedModel, catalog: Catalog, documents: MixedDocuments) -> Table:
    """Scores of the backbone, each expert, merging, Arrow, routing and the oracle, document by document.

    `pooling` is fixed beforehand; the strength of the tuned merge and the best single expert are chosen on these very
    documents, which flatters those two rows.
    """
    strengths = {s: uniform(model, s) for s in (1.0, 2.0, 3.0)}
    systems: list[System] = [
        backbone(),
        *single_experts(model),
        *strengths.values(),
        parameter_average(model),
        arrow(model, TOP_K),
        composed(ROUTED),
        _pooled_gates(model),
        _pooled_signatures(model, catalog),
        documents.oracle(len(model.experts)),
    ]
    table = evaluate(model, [documents.task()], systems)
    return _named(table.with_best_experts(model.experts), [system.name for system in strengths.values()])


def gains(model: ComposedModel, domains: Sequence[Domain], tokenizer: Any) -> list[tuple[str, float, float]]:
    """Each expert on its own domain's held-out text: (name, nats per token of the backbone, of the expert)."""
    rows: list[tuple[str, float, float]] = []
    for domain in domains:
        task = own_domain(domain, tokenizer)
        alone = System(domain.name, lambda m, n=domain.name: m.only(n))
        means = evaluate(model, [task], [backbone(), alone]).means("nats")
        rows.append((domain.name, means["backbone"], means[domain.name]))
    return rows


def _pooled_gates(model: ComposedModel) -> System:
    scores = {site: mixture.router.scores for site, mixture in model.mixtures.items()}
    return scored(POOLED, model, scores, TOP_K, sharing=Sharing(pooling=POOLING))  # pyright: ignore[reportArgumentType]


def _pooled_signatures(model: ComposedModel, catalog: Catalog) -> System:
    signatures = [catalog.expert(expert).signatures or {} for expert in model.experts]
    scores = {site: SignatureScores.from_signatures([own.get(site) for own in signatures]) for site in model.mixtures}
    return scored(SIGNED, model, scores, TOP_K, sharing=Sharing(pooling=POOLING))


def _named(table: Table, strengths: Sequence[str]) -> Table:
    """Strength 1 is plain merging; the best strength gets a row of its own, the others and single experts go."""
    means = table.means("nats")
    best = min(strengths, key=means.__getitem__)
    names = {strengths[0]: MERGED}
    kept = [score for score in table.scores if score.system not in strengths[1:] and score.system != ORACLE]
    chosen = next(score for score in table.scores if score.system == best and score.metric == "nats")
    renamed = [replace(score, system=names.get(score.system, score.system)) for score in kept if score.metric == "nats"]
    return Table([*renamed, replace(chosen, system=TUNED)])


def verdict(table: Table) -> list[str]:
    """What the table says, in words, also where routing loses."""
    lines: list[str] = []
    for other in (BEST_SINGLE, MERGED, TUNED):
        gap = table.differences("nats", other)[ROUTED]
        lines.append(_sentence("Routing as published", other, gap))
    for better in (POOLED, SIGNED):
        lines.append(_sentence(better, ROUTED, table.differences("nats", ROUTED)[better]))
    return lines


def _sentence(system: str, other: str, gap: Any) -> str:
    amount = f"{abs(gap.value):.3f} nats per token ({gap.low:+.3f} .. {gap.high:+.3f})"
    if gap.high < 0:
        return f"{system} is better than {other} by {amount}."
    if gap.low > 0:
        return f"{system} is worse than {other} by {amount}."
    return f"{system} and {other} are level here: {gap.value:+.3f} nats per token ({gap.low:+.3f} .. {gap.high:+.3f})."


def shown_document(documents: MixedDocuments, tokenizer: Any, table: Table) -> str:
    """The text of the mixed document on which routing gains most over the backbone."""
    (row,) = table.cells("nats").values()
    at = int(torch.argmax(row["backbone"] - row[ROUTED]))
    return str(tokenizer.decode(documents.tokens[at].tolist()))
