"""The tables and plots of the few-shot comparison, from its cells."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.few_shot_exam import Mean, averaged
from benchmarks.few_shot_glyphs import IN_DOMAINS, KEPT, OUT_DOMAINS
from mixwright.evaluation.table import markdown

Cells = Mapping[str, Mapping[str, Any]]
Scores = list[Mapping[str, Any]]
"""Of each seed."""
PRETRAINED = "pretrained"
GROUPS = {"in distribution": IN_DOMAINS, "out of distribution": OUT_DOMAINS, "retention": (KEPT,)}


def tables(cells: Cells) -> str:
    """Everything that the cells can say."""
    parts = [main_table(cells), by_domain(cells), cost(cells), dial(cells), learning(cells), after_tuning(cells)]
    return "\n\n".join(part for part in parts if part)


def found(cells: Cells, kind: str) -> dict[str, Scores]:
    """Name -> what each seed got; dials by `name, strength`."""
    named: dict[str, Scores] = {}
    for key, cell in cells.items():
        first, *names, _ = key.split("|")
        if first == kind:
            named.setdefault("|".join(names), []).append(cell)
    return named


def seed_of(cells: Cells, kind: str) -> str:
    """The seeds that cells of a kind are of."""
    return ", ".join(sorted({key.rpartition("|")[2] for key in cells if key.startswith(f"{kind}|")}))


def mean(scores: Scores, domains: Sequence[str], minus: Scores | None = None) -> Mean:
    """Accuracy in per cent over domains, or its paired difference to others."""
    there = [name for name in scores[0] if belongs(name, domains)]
    runs = [[[100 * value for value in seed[name]["accuracy"]] for name in there] for seed in scores]
    if minus is not None:
        for place, seed in enumerate(runs):
            other = minus[min(place, len(minus) - 1)]
            for at, name in enumerate(there):
                base = other[name]["accuracy"]
                seed[at] = [value - 100 * before for value, before in zip(seed[at], base, strict=False)]
    return averaged(runs)


def belongs(name: str, domains: Sequence[str]) -> bool:
    """Whether a domain is one of these, by its name or by how it begins: see `few_shot_glyphs.TRAINED`."""
    return name in domains or name.partition(":")[0] in domains


def ece(scores: Scores, domains: Sequence[str]) -> float:
    values = [found["ece"] for seed in scores for name, found in seed.items() if belongs(name, domains)]
    return sum(values) / len(values)


def said(value: Mean, sign: bool = False) -> str:
    return f"{value.value:+.1f} ± {value.half:.1f}" if sign else f"{value.value:.1f} ± {value.half:.1f}"


def cell(scores: Scores, domains: Sequence[str], minus: Scores) -> str:
    """A mean, and in brackets its paired difference to others."""
    return f"{mean(scores, domains).value:.1f} ({said(mean(scores, domains, minus), True)})"


def main_table(cells: Cells) -> str:
    """Means over domains of each kind, the paired difference to the pretrained weights, calibration."""
    named = found(cells, "direct")
    if PRETRAINED not in named:
        return ""
    base = named[PRETRAINED]
    rows: list[list[str]] = []
    wise = {name.replace("P>M>F|", "P>M>F, WiSE "): scores for name, scores in found(cells, "dial").items()}
    named |= {name: scores for name, scores in wise.items() if "WiSE" in name}
    for name in sorted(named, key=lambda n: mean(named[n], OUT_DOMAINS).value):
        scores = named[name]
        got = [cell(scores, domains, base) for domains in GROUPS.values()]
        errors = [f"{ece(scores, domains):.3f}" for domains in GROUPS.values()]
        rows.append([name, *got, *errors, f"{len(scores)} x {len(scores[0][KEPT]['accuracy'])}"])
    count = len(base[0][KEPT]["accuracy"])
    title = f"Direct inference, {count} episodes a domain; in brackets the paired difference to pretrained, 95 %."
    names = list(GROUPS)
    return title + "\n\n" + markdown(["row", *names, "ECE in", "ECE out", "ECE retention", "seeds x episodes"], rows)


def by_domain(cells: Cells) -> str:
    """Accuracy in every domain of the rows that the text speaks of."""
    named = found(cells, "direct")
    spoken_of = ("P>M>F", "P>M>F + distillation", "SMAT")
    shown = [PRETRAINED, *spoken_of, *(f"{name}, 4 x tasks" for name in spoken_of)]
    shown = [name for name in shown if name in named]
    if not shown:
        return ""
    order = (IN_DOMAINS, OUT_DOMAINS, (KEPT,))
    domains = [name for kind in order for name in named[shown[0]][0] if belongs(name, kind)]
    rows = [[domain, *(said(mean(named[name], [domain])) for name in shown)] for domain in domains]
    return "By domain, mean and 95 %.\n\n" + markdown(["domain", *shown], rows)


def cost(cells: Cells) -> str:
    """What meta-tuning took, and what became of the masks."""
    rows: list[list[str]] = []
    for name, seeds in found(cells, "trained").items():
        first = seeds[0]
        masks = [
            " ".join(f"{value:.2f}" for value in first["sparsity"]) if "sparsity" in first else "-",
            f"{first['union']:.2f}" if "union" in first else "-",
            f"{first['overlap']:.2f} ({first['overlap_by_chance']:.2f})" if "overlap" in first else "-",
        ]
        spent = sum(seed["cpu_seconds"] for seed in seeds) / len(seeds)
        rows.append([name, f"{spent:.0f}", f"{first['changeable']:,}", *masks])
    if not rows:
        return ""
    heads = ["row", "CPU-s", "weights that may change", "sparsity of each expert", "union", "overlap (by chance)"]
    return "Meta-tuning, one seed.\n\n" + markdown(heads, rows)


def dial(cells: Cells) -> str:
    """Gain against forgetting: every dial and every row as a point, those that nothing beats on both marked."""
    named = found(cells, "direct")
    if PRETRAINED not in named:
        return ""
    base = named[PRETRAINED]
    points = {name: scores for name, scores in named.items() if name != PRETRAINED}
    pools = ("SMAT", "SMAT, 4 x tasks", "random masks", "soft merging")
    dialled = {
        "|".join([f"{name}, uniform mixture" if name in pools else name, share]): scores
        for (name, share), scores in ((key.split("|"), scores) for key, scores in found(cells, "dial").items())
    }
    dialled |= found(cells, "routed dial")
    points |= {name.replace("|", " at "): scores for name, scores in dialled.items()}
    places = {
        name: tuple(mean(scores, domains, base).value for domains in GROUPS.values()) for name, scores in points.items()
    }
    sets = (
        ("all rows and dials", places),
        ("those that nothing beats both out of distribution and in retention", {
            name: place
            for name, place in places.items()
            if not any(o[1] > place[1] and o[2] > place[2] for o in places.values())
        }),
    )  # fmt: skip
    parts: list[str] = []
    for what, chosen in sets:
        order = sorted(chosen.items(), key=lambda item: item[1][2], reverse=True)
        rows = [[name, *(f"{value:+.1f}" for value in place)] for name, place in order]
        title = f"Gain against forgetting, {what}: differences to the pretrained weights, least forgetting first."
        parts.append(title + "\n\n" + markdown(["row", *GROUPS], rows))
    return "\n\n".join(parts)


def learning(cells: Cells) -> str:
    """In- and out-of-distribution accuracy by tasks seen."""
    curves = found(cells, "curve")
    if not curves:
        return ""
    named, direct = sorted({key.split("|")[0] for key in curves}), found(cells, "direct")
    tasks = sorted({int(key.split("|")[1]) for key in curves})
    number = len(next(iter(curves.values()))[0][KEPT]["accuracy"])

    def cut(scores: Scores) -> Scores:
        return [{d: {"accuracy": v["accuracy"][:number], "ece": v["ece"]} for d, v in scores[0].items()}]

    rows: list[list[str]] = []
    for count in [0, *tasks, -1]:
        row = [str(count) if count >= 0 else "all"]
        for name in named:
            seen = direct[PRETRAINED] if count == 0 else direct[name] if count < 0 else curves.get(f"{name}|{count}")
            means = [] if seen is None else [mean(cut(seen), domains).value for domains in GROUPS.values()]
            row.append(" / ".join(f"{value:.1f}" for value in means) or "-")
        rows.append(row)
    title = (
        f"Learning: in / out of distribution / retention by tasks seen, {number} episodes a domain, seed "
        f"{seed_of(cells, 'curve')}."
    )
    return title + "\n\n" + markdown(["tasks", *named], rows)


def after_tuning(cells: Cells) -> str:
    """With fine-tuning on each support set, beside the same episodes without."""
    named, direct = found(cells, "tuned"), found(cells, "direct")
    if not named:
        return ""
    direct |= {name.replace("|", ", WiSE "): scores for name, scores in found(cells, "dial").items()}
    rows: list[list[str]] = []
    for name, scores in named.items():
        rows.append([name, *(cell(scores, domains, direct[name][:1]) for domains in GROUPS.values())])
    number = len(next(iter(named.values()))[0][KEPT]["accuracy"])
    title = (
        f"Fine-tuned on each support set, {number} episodes a domain, seed {seed_of(cells, 'tuned')}; in brackets the "
        "paired gain over direct."
    )
    return title + "\n\n" + markdown(["row", *GROUPS], rows)
