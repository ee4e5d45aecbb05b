"""What the card of a pool says: what it changes and how sparsely, what it was tuned on, what is not known of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixwright.composition.card import plain
from mixwright.composition.measured_domains import MeasuredDomain, lost_sentences, measured_in
from mixwright.composition.seen_tasks import SeenTasks
from mixwright.evaluation.pool import decided_by_hand, pool_of
from mixwright.experts.sparse_deltas import SparseDeltas

if TYPE_CHECKING:
    from mixwright.methods.smat.model import FewShotModel


def pool_lines(model: "FewShotModel") -> list[str]:
    """Markdown; counted, not promised."""
    return [*_changes(model), *_decided(model), *_tuned_on(model), *_limits(model), ""]


def _changes(model: "FewShotModel") -> list[str]:
    if not isinstance(model.mixture.experts, SparseDeltas):
        return [
            "## What it changes",
            "",
            f"{len(model.experts)} dense changes of the weights, one for each expert (soft merging); no weight is left "
            "as pretrained but at strength 0.",
            "",
        ]
    pool = pool_of(model)
    rows = [
        f"| {plain(name)} | {1 - density:.1%} | {fractional:.0%} |"
        for name, density, fractional in zip(pool.experts, pool.density, pool.fractional, strict=True)
    ]
    return [
        "## What it changes",
        "",
        f"{len(pool.experts)} experts over {pool.weights:,} weights of the backbone. Together they touch "
        f"{pool.union:.1%}; every other weight is the pretrained one to the bit, and so are all at strength 0.",
        "",
        "| expert | leaves as pretrained | of its masks, neither 0 nor 1 |",
        "|---|---|---|",
        *rows,
        "",
        *_by_block(model),
        "The pool is bound to its backbone by the SHA-256 of every tensor: another one is refused.",
        "",
    ]


def _by_block(model: "FewShotModel") -> list[str]:
    blocks = ", ".join(f"`{plain(block)}`" for block in model.deltas.blocks)
    return [f"A support set chooses a mixture for each block: {blocks}.", ""] if blocks else []


def _decided(model: "FewShotModel") -> list[str]:
    said = decided_by_hand(model.experts, model.active, model.forbidden, model.frozen_experts)
    if not said:
        return []
    undo = "`model.set_active(None)`, `model.forbid()` and `model.freeze_expert(name, False)` take it back."
    return ["## What a person decided", "", *(f"- {plain(line)}" for line in said), "", undo, ""]


def _tuned_on(model: "FewShotModel") -> list[str]:
    seen = SeenTasks.read(model.whole)
    if seen is None:
        return ["## What it was tuned on", "", "Not recorded: it remembers no tasks of its meta-tuning.", ""]
    counts = [int((seen.domains == at).sum()) for at in range(len(seen.names))]
    listed = [f"- {plain(name)}: {count} tasks remembered" for name, count in zip(seen.names, counts, strict=True)]
    return ["## What it was tuned on", "", *listed, ""]


def _limits(model: "FewShotModel") -> list[str]:
    return [
        "## Where it may lose",
        "",
        *_measured(measured_in(model.whole)),
        "Whether it beats the frozen backbone depends on the domain, and nothing here says so of yours: compare both "
        "on labelled items (`mixwright explain this-folder --support examples --query held-out`; strength 0 is the "
        "frozen backbone). Sparsity saves room on disk; an adapted model runs no faster than its backbone.",
    ]


def _measured(domains: Sequence[MeasuredDomain]) -> list[str]:
    """What the held-out domains of the training said, the worst first."""
    if not domains:
        return ["Not measured: no domain was held out of its meta-tuning (`data.held_out_domains`).", ""]
    rows = [
        f"| {plain(one.name)} | {one.pretrained:.1%} | {one.adapted:.1%} | {100 * one.difference:+.1f} "
        f"\u00b1 {100 * one.half_width:.1f} | {one.episodes} |"
        for one in domains
    ]
    return [
        *map(plain, lost_sentences(domains)),
        "",
        "| held-out domain | pretrained, right | pool, right | difference in points, 95 % | episodes |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Held-out classes of a domain that was trained on are near to it; those of other domains say more.",
        "",
    ]
