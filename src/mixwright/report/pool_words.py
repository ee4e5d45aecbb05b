"""What is said of a pool of sparse experts, on the page and in the terminal alike."""

from mixwright.composition.measured_domains import lost_sentences
from mixwright.evaluation.pool import Pool, decided_by_hand
from mixwright.evaluation.pool_episode import Measured, PoolEpisode, best_strength

_MASKS = (
    ("Expert", "a mask over the backbone's weights: which of them it changes, and how fully. All share one change."),
    ("Sparsity", "the share of weights that an expert leaves exactly as they were pretrained."),
    ("Overlap", "of the weights that either of two experts changes, the share that both do."),
    ("Chance level", "the overlap of two masks of the same sizes that know nothing of each other: p / (2 - p)."),
)
_CHANGES = (("Expert", "a change of its own for every weight of the backbone."),)
_BOTH = (
    ("Mixture", "how much each expert counts for one task; the shares add up to 100 %."),
    ("Strength", "a dial over the whole change: 0 is the pretrained model to the bit, 1 the mixture as it was chosen."),
    ("Support set", "the few labelled examples that say what the task is. No gradient is taken on them."),
    ("Doubt", "how far the mixture moves when the examples are drawn again from themselves, 0 to 1."),
    ("Novelty", "how far the task lies from those of meta-tuning, against how far those lie from each other."),
    ("Calibration error", "the gap between how sure the classifier says it is and how often it is right."),
)


def glossary(pool: Pool) -> tuple[tuple[str, str], ...]:
    """The words that are used of such a pool, each with its meaning."""
    return (*(_MASKS if pool.masked else _CHANGES), *_BOTH)


def percent(share: float) -> str:
    """Two digits are enough."""
    return f"{100 * share:.0f}%" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def pool_sentences(pool: Pool) -> list[str]:
    """What the pool is, in one sentence, and how its experts stand to each other, in another."""
    known = [
        *decided_by_hand(pool.experts, pool.active, pool.forbidden, pool.frozen),
        *lost_sentences(pool.measured),
    ]
    if not pool.masked:
        return [
            f"{len(pool.experts)} experts, each with a change of its own for all {pool.weights:,} weights (soft "
            "merging): there are no masks, and no weight is left as pretrained but at strength 0.",
            *known,
        ]
    low, high = min(pool.density), max(pool.density)
    each = percent(low) if percent(low) == percent(high) else f"{percent(low)} to {percent(high)}"
    said = [
        f"{len(pool.experts)} experts, each of which changes {each} of {pool.weights:,} weights; together they touch "
        f"{percent(pool.union)}, and every other weight is the pretrained one to the bit."
    ]
    pairs = [(i, j) for i in range(len(pool.experts)) for j in range(i)]
    if pairs:
        mean = sum(pool.overlap[i][j] for i, j in pairs) / len(pairs)
        chance = sum(pool.chance[i][j] for i, j in pairs) / len(pairs)
        times = f", {mean / chance:.1f} times what chance gives ({chance:.2f})" if chance > 0 else ""
        said.append(f"Two experts overlap by {mean:.2f} on average{times}.")
    return [*said, *known]


def episode_sentences(episode: PoolEpisode) -> list[str]:
    """What was chosen, how sure that is, and what the dial says."""
    lead = max(episode.experts, key=lambda one: one.weight)
    even = "nearly evenly over all experts" if episode.entropy > 0.95 else f"mostly on {lead.name}"
    said = [
        f"{episode.name}: {episode.shots} examples of {len(episode.classes)} classes. The mixture lies {even} "
        f"({lead.name} has {percent(lead.weight)}); doubt {episode.doubt:.2f} of 1; {episode.novelty}."
    ]
    if episode.items == 0:
        return [*said, "Nothing could be measured: no class has two examples, and no query items were given."]
    best, dial = best_strength(episode), dict(episode.dial)
    zero, one, top = dial[0.0], dial[1.0], dial[best]
    assert zero is not None and one is not None and top is not None
    said.append(
        f"Measured on {episode.items} {episode.measured_on}: {percent(zero.accuracy)} right with the pretrained "
        f"weights, {percent(one.accuracy)} at full strength. The loss is least at strength {best:g} ({top.loss:.3f})."
    )
    if episode.measured_on != "query items":
        said.append(
            "These are the examples that the mixture was chosen by, so the figures flatter it; give query items."
        )
    return said


def without_sentence(whole: Measured | None, without: Measured | None) -> str:
    """What leaving an expert out does."""
    if without is None or whole is None:
        return "not measured"
    return f"{100 * (without.accuracy - whole.accuracy):+.1f} points, loss {without.loss - whole.loss:+.3f}"
