"""The tables of the pretrained comparison, from its cells: what is not measured yet is left out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.hybrid_pretrained_cells import EPOCH, KINDS, MAIN, POINTS
from benchmarks.hybrid_pretrained_pair import NAMES
from benchmarks.hybrid_pretrained_search import SEARCHES
from benchmarks.hybrid_pretrained_texts import TARGETS
from mixwright.evaluation.table import markdown
from mixwright.evaluation.verdict import EQUAL_FLOPS, EQUAL_TOKENS, Verdict, best_of, verdict

Found = Mapping[str, Mapping[str, Any]]
Runs = Sequence[Mapping[str, Any]]
WITHIN = 0.05
SAID = ("hybrid K=1", "hybrid K=2", "hybrid K=1, even weights")
EQUAL_TUNING = "equal tuning"
"""As many tokens as the hybrid was tuned on, those of its search not counted."""


def tables(found: Found) -> str:
    """All of them."""
    corpora = [*TARGETS, *([EPOCH] if seeds_of(found, f"ensemble: {EPOCH}") else [])]
    parts = [main_table(found, corpus) for corpus in corpora]
    return "\n\n".join([*parts, sweep_table(found), ablation_table(found), mix_table(found)])


def seeds_of(found: Found, start: str) -> list[int]:
    """The seeds for which this cell is there."""
    return [seed for seed in range(100) if f"{start} seed {seed}" in found]


def systems(found: Found, corpus: str) -> dict[str, dict[int, Mapping[str, Any]]]:
    """System -> seed -> its record."""
    rows: dict[str, dict[int, Mapping[str, Any]]] = {}

    def put(name: str, start: str, *inside: str) -> None:
        for seed in seeds_of(found, f"{start}: {corpus}"):
            record: Any = found[f"{start}: {corpus} seed {seed}"]
            for key in inside:
                record = record[key]
            rows.setdefault(name, {})[seed] = record

    for name in NAMES:
        put(f"{name}, {EQUAL_TOKENS}", f"components, {EQUAL_TOKENS}", name)
    for name in NAMES:
        put(f"{name}, {EQUAL_FLOPS}", f"{name}, {EQUAL_FLOPS}")
    for name in NAMES:
        put(f"{name}, {EQUAL_TUNING}", f"{name}, {EQUAL_TUNING}")
    put("logit ensemble, tuned apart", f"components, {EQUAL_TOKENS}", "ensemble apart")
    put("logit ensemble, tuned together", "ensemble")
    put("hybrid K=1, even weights", f"uniform {MAIN[0]}")
    for shape in MAIN:
        put(f"hybrid K={shape.blocks}", f"hybrid {shape}", "hybrid")
    for shape in MAIN:
        put(f"hybrid K={shape.blocks}, cut", f"hybrid {shape}", "cut")
        put(f"hybrid K={shape.blocks}, cut and tuned again", f"hybrid {shape}", "cut and tuned again")
        for kept in ("cut", "cut and tuned again"):
            put(f"hybrid K={shape.blocks}, {kept}, along its blocks", f"cut along blocks {shape}", kept)
    return rows


def best_component(rows: Mapping[str, Mapping[int, Mapping[str, Any]]], budget: str) -> str | None:
    """The component with the least loss on the search part, over seeds."""
    there = {name: rows[f"{name}, {budget}"] for name in NAMES if f"{name}, {budget}" in rows}
    if not there:
        return None
    return best_of({n: statistics.mean(run["search_part"] for run in runs.values()) for n, runs in there.items()})


def verdicts(found: Found, corpus: str) -> list[Verdict]:
    """Of every system that is no component alone, against the best component and the ensemble."""
    rows = systems(found, corpus)
    said: list[Verdict] = []
    for system in rows:
        if not system.startswith(("hybrid", "logit")):
            continue
        for budget in (EQUAL_TOKENS, EQUAL_FLOPS, EQUAL_TUNING):
            rival = best_component(rows, budget)
            if rival is not None:
                said += compared(rows, system, f"{rival}, {budget}", f"the best component ({rival})", budget)
        if system.startswith("hybrid"):
            together = "logit ensemble, tuned together"
            said += compared(rows, system, together, "the logit ensemble", EQUAL_TOKENS)
    return said


def compared(rows: Any, system: str, rival: str, called: str, budget: str) -> list[Verdict]:
    """The verdict over the seeds that both have; none where there are none."""
    shared = sorted(set(rows.get(system, {})) & set(rows.get(rival, {})))
    if not shared:
        return []
    ours, theirs = (_stacked([rows[name][seed] for seed in shared]) for name in (system, rival))
    return [verdict(ours, theirs, system=system, rival=called, budget=budget)]


def main_table(found: Found, corpus: str) -> str:
    """Systems by loss, cost, and what may be said of them."""
    rows = systems(found, corpus)
    said = {(v.system, v.rival.partition(" (")[0], v.budget): v for v in verdicts(found, corpus)}
    lines: list[list[str]] = []
    base: Any = found.get(f"untouched {corpus.partition(',')[0]}", {})
    for name in (*NAMES, "ensemble"):
        if name in base:
            lines.append([f"{name}, untouched", f"{statistics.mean(base[name]):.4f}", *["-"] * 8])
    for system, runs in rows.items():
        records = list(runs.values())
        pairs = (("the best component", EQUAL_TOKENS), ("the best component", EQUAL_FLOPS))
        gaps = [_gap(said.get((system, *pair))) for pair in (*pairs, ("the logit ensemble", EQUAL_TOKENS))]
        lines.append(
            [
                system,
                _mean([statistics.mean(r["test"]) for r in records], 4),
                _mean([r["general"] for r in records], 3),
                f"{statistics.mean(r['steps'] for r in records):.0f}",
                f"{statistics.mean(r['train_flops'] for r in records) / 1e12:.2f}",
                f"{statistics.mean(r['cpu_seconds'] for r in records):.0f}",
                f"{records[0]['flops_per_token'] / 1e6:.2f}",
                *gaps,
            ]
        )
    head = ["system", "test loss", "general loss", "steps", "training TFLOPs", "CPU s", "MFLOPs per token"]
    gaps = ["minus best component, equal tokens", "minus best component, equal FLOPs", "minus logit ensemble"]
    count = len(next(iter(rows.values()))) if rows else 0
    title = f"#### {corpus} ({count} seeds, {len(base[NAMES[0]]) if base else 0} test documents)"
    sentences = [v.sentence() for v in said.values() if v.system in SAID and v.budget in (EQUAL_TOKENS, EQUAL_FLOPS)]
    sentences += [v.sentence() for v in said.values() if v.system in SAID[:2] and v.budget == EQUAL_TUNING]
    weights = [_weights(found, corpus, s) for s in MAIN if seeds_of(found, f"hybrid {s}: {corpus}")]
    return "\n".join(
        [title, "", markdown([*head, *gaps], lines), "", *(f"- {line}" for line in (*sentences, *weights))]
    )


def sweep_table(found: Found) -> str:
    """The loss at each mixture weight, each search's, and how far from the sweep's best it is."""
    seeds = seeds_of(found, "sweep 1")
    lines: list[list[str]] = []
    best: dict[int, float] = {}
    for seed in seeds:
        losses = {point: statistics.mean(found[f"sweep {point:g} seed {seed}"]["test"]) for point in POINTS}
        best[seed] = min(losses.values())
    for point in POINTS:
        runs = [found[f"sweep {point:g} seed {seed}"] for seed in seeds_of(found, f"sweep {point:g}")]
        if runs:
            lines.append([f"{point:g}", _mean([statistics.mean(r["test"]) for r in runs], 4), "", ""])
    for kind in SEARCHES:
        there = [seed for seed in seeds_of(found, f"searched {kind}") if seed in best]
        if not there:
            continue
        runs = [found[f"searched {kind} seed {seed}"] for seed in there]
        gaps = [statistics.mean(r["test"]) - best[seed] for r, seed in zip(runs, there, strict=True)]
        shares = " ".join(f"{r['weights'][0][0]:.3f}" for r in runs)
        inside = sum(gap <= WITHIN for gap in gaps)
        lines.append(
            [
                kind,
                _mean([statistics.mean(r["test"]) for r in runs], 4),
                shares,
                f"{max(gaps):+.4f}, {inside} of {len(gaps)}",
            ]
        )
    head = [
        f"weight of {NAMES[0]}, or search",
        "test loss",
        "weight found, by seed",
        f"worst minus best of the sweep, within {WITHIN}",
    ]
    return "\n".join([f"#### Sweep and searches ({len(seeds)} seeds)", "", markdown(head, lines)])


def ablation_table(found: Found) -> str:
    """Projectors by general loss before and after alignment, and the target's loss after tuning."""
    lines: list[list[str]] = []
    for kind in KINDS:
        runs = [found[f"projectors {kind} seed {seed}"] for seed in seeds_of(found, f"projectors {kind}")]
        if runs:
            lines.append(
                [kind]
                + [_mean([r["align"][when] for r in runs], 3) for when in ("before", "after")]
                + [_mean([statistics.mean(r["test"]) for r in runs], 4)]
                + [str(runs[0]["parameters"]), str(len(runs))]
            )
    tuned = "target's test loss after tuning"
    head = ["projectors", "general loss before alignment", "after", tuned, "parameters", "seeds"]
    return "\n".join(["#### Projectors, K=1, even weights", "", markdown(head, lines)])


def mix_table(found: Found) -> str:
    """Two specialists on half of each one's corpus."""
    runs = [found[f"mix seed {seed}"] for seed in seeds_of(found, "mix")]
    if not runs:
        return ""
    lines: list[list[str]] = []
    for system in runs[0]:
        by_corpus = [[statistics.mean(run[system][corpus]) for run in runs] for corpus in TARGETS]
        both = [statistics.mean(pair) for pair in zip(*by_corpus, strict=True)]
        lines.append([system, *(_mean(values, 4) for values in (*by_corpus, both))])
    title = f"#### Two specialists on a mix of their corpora, K=1 ({len(runs)} seeds)"
    return "\n".join([title, "", markdown(["system", *TARGETS, "mean"], lines)])


def _weights(found: Found, corpus: str, shape: Any) -> str:
    start = f"hybrid {shape}: {corpus}"
    shown = [_rows(found[f"{start} seed {seed}"]["weights"]) for seed in seeds_of(found, start)]
    return f"weight of {NAMES[0]} (embedding, blocks, head), K={shape.blocks}, by seed: {'; '.join(shown)}"


def _rows(weights: Mapping[str, Any]) -> str:
    return " ".join(f"{row[0]:.2f}" for row in (weights["embedding"], *weights["blocks"], weights["head"]))


def _gap(said: Verdict | None) -> str:
    if said is None:
        return "-"
    mark = {"better": "better", "worse": "worse", "no significant difference": "n.s."}[said.word]
    return f"{said.difference.value:+.4f} ({said.difference.low:+.4f} .. {said.difference.high:+.4f}) {mark}"


def _mean(values: Sequence[float], digits: int) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def _stacked(runs: Runs) -> Tensor:
    return torch.tensor([run["test"] for run in runs], dtype=torch.float64)
