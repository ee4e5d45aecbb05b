"""What sparse interpolated experts are worth: few-shot episodes in and out of distribution, offline, on two cores.

python -m benchmarks.few_shot --pretrain --out DIR  # the backbone, about five minutes of one core
python -m benchmarks.few_shot                       # the comparison; goes on from --cache where it was cut
python -m benchmarks.few_shot --rows "SMAT, both"   # only these rows, as routed and with all experts alike
python -m benchmarks.few_shot --report              # the tables of the method's README, from the cache or the JSON
python -m benchmarks.few_shot --quick               # a walk through everything; its numbers say nothing
python -m benchmarks.few_shot --first-seed 7        # other seeds; their cells, rows and JSON lie apart in --cache
python -m benchmarks.few_shot --train-scripts "Latn Cyrl" --train-scripts "Thai Khmr, outlined" \
    --held-out-scripts "Armn Geor Ethi" --draw-seed 3   # other scripts (ISO 15924), other letters; own backbone

Domains: see `few_shot_glyphs`. Contenders: see `few_shot_rows`. Every contender sees the same training episodes and the
same test episodes. Omniglot and MNIST are read from --data and left out where they are not there.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.cells import Cells
from benchmarks.few_shot_backbone import Pretraining, empty_vit, pretrain
from benchmarks.few_shot_exam import Exams, Score, Weights
from benchmarks.few_shot_glyphs import FONTS, STYLES, Drawing, World, world
from benchmarks.few_shot_rows import (
    LONG,
    MAIN,
    MORE,
    PMF,
    PMF_KD,
    ROUTED,
    SMAT,
    Budget,
    Row,
    Trained,
    Trainer,
    between,
    load,
    row_named,
)
from benchmarks.few_shot_tables import tables
from benchmarks.few_shot_tuning import tuned
from benchmarks.record import surroundings, write_json
from mixwright.composition.features import FeatureExtractor

RESULT = Path("benchmarks/results/few_shot.json")
COMMAND = "python -m benchmarks.few_shot"
HOME = Path.home() / ".cache/mixwright"
DIALS = (0.25, 0.5, 0.75)
CURVES = (PMF, PMF_KD, SMAT)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    episodes: int = 600
    routed_episodes: int = 150
    """Of variants of the pool, which need a pass for every episode."""
    curve_episodes: int = 50
    tuned_episodes: int = 8
    seeds: int = 2
    first_seed: int = 0


class Bench:
    """The domains, the trainer and the exams, and the cells that hold what was measured."""

    def __init__(self, given: World, backbone: Callable[[], nn.Module], budget: Budget, sizes: Sizes, folder: Path):
        self.sizes, self.budget = sizes, budget
        self.trainer = Trainer(backbone, given.train, budget, folder)
        self.model = backbone().eval()
        self.base = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        extractor = FeatureExtractor(self.model, "cls")

        def embed(pixels: Tensor, weights: Weights | None) -> Tensor:
            if weights is None:
                return extractor(pixels)
            replaced = {f"backbone.{name}": tensor for name, tensor in weights.items()}
            return torch.func.functional_call(extractor, replaced, (pixels,))

        self.embed = embed
        self.exams = Exams(given.tests, embed, sizes.episodes)

    def direct(self, cells: Cells, row: Row, seed: int) -> None:
        """The row as it is used: no gradient step at test time."""
        cells.take(f"trained|{row.name}|{seed}", lambda: self._described(row, seed))
        routed = None if row in (row_named(SMAT), LONG[1]) else self.sizes.routed_episodes
        key = f"direct|{row.name}|{seed}"
        cells.take(key, lambda: plain(self._scores(self.trainer.trained(row, seed), None, routed)))

    def dials(self, cells: Cells, row: Row, seed: int) -> None:
        """The row between the pretrained weights (0) and its own (1); a pool's experts count alike here."""
        for share in DIALS:
            key = f"dial|{row.name}|{share}|{seed}"
            cells.take(key, lambda share=share: plain(self.exams.fixed(self._between(row, seed, share))))

    def routed_dials(self, cells: Cells, row: Row, seed: int) -> None:
        """The same dial on what each support set chooses."""
        for share in DIALS:

            def measure(share: float = share) -> dict[str, Any]:
                routed = partial(self.trainer.trained(row, seed).routed, strength=share)
                return plain(self.exams.chosen(routed, self.sizes.routed_episodes))

            cells.take(f"routed dial|{row.name}|{share}|{seed}", measure)

    def alike(self, cells: Cells, row: Row, seed: int) -> None:
        """A variant of the pool, all experts alike: what the masks are worth, without a pass for every episode."""
        cells.take(f"trained|{row.name}|{seed}", lambda: self._described(row, seed))
        key = f"direct|{row.name}, uniform mixture|{seed}"
        cells.take(key, lambda: plain(self.exams.fixed(self._uniform(row, seed))))

    def both_ways(self, cells: Cells, row: Row, seed: int) -> None:
        """A variant of the pool as its router chooses, and with all experts alike."""
        self.direct(cells, row, seed)
        self.alike(cells, row, seed)

    def ablations(self, cells: Cells, row: Row, seed: int) -> None:
        """A pool with all experts alike, and with masks of 0 and 1."""

        def binary() -> dict[str, Any]:
            found = self.trainer.trained(row, seed)
            found.model.deltas.binarise()
            return plain(self.exams.chosen(found.routed))

        uniform = partial(self._uniform, row, seed)
        cells.take(f"direct|{row.name}, uniform mixture|{seed}", lambda: plain(self.exams.fixed(uniform())))
        cells.take(f"direct|{row.name}, binarised masks|{seed}", binary)

    def curve(self, cells: Cells, row: Row, seed: int) -> None:
        """Accuracy by the number of tasks seen, on the first test episodes."""
        for tasks in row.budget(self.budget).snapshots:

            def at(tasks: int = tasks) -> dict[str, Any]:
                found = self.trainer.trained(row, seed)
                load(found.model, found.snapshots[tasks])
                number = self.sizes.curve_episodes
                return plain(self._scores(found, number, number))

            cells.take(f"curve|{row.name}|{tasks}|{seed}", at)

    def tuned(self, cells: Cells, row: Row | None, seed: int, share: float = 1.0) -> None:
        """Fine-tuned on each support set, all weights from where the row stands, at a rate that the support chooses."""
        name = "pretrained" if row is None else row.name if share == 1.0 else f"{row.name}, WiSE {share}"

        def measure() -> dict[str, Any]:
            start = self._start(row, seed, share)
            return plain(self.exams.tuned(partial(tuned, self.embed, start), self.sizes.tuned_episodes))

        cells.take(f"tuned|{name}|{seed}", measure)

    def _start(self, row: Row | None, seed: int, share: float) -> Callable[[Tensor, Tensor], Weights]:
        if row is None:
            return lambda features, labels: self.base
        found = self.trainer.trained(row, seed)
        if found.is_fixed:
            weights = self.base | between(self.base, found.uniform(), share)
            return lambda features, labels: weights
        return lambda features, labels: self.base | dict(found.routed(features, labels))

    def _uniform(self, row: Row, seed: int) -> Weights:
        return self.trainer.trained(row, seed).uniform()

    def _between(self, row: Row, seed: int, share: float) -> Weights:
        return between(self.base, self._uniform(row, seed), share)

    def _scores(self, found: Trained, fixed: int | None, routed: int | None) -> dict[str, Score]:
        """On so many episodes, by whether its weights are the same for all."""
        if found.is_fixed:
            return self.exams.fixed(found.uniform(), fixed)
        return self.exams.chosen(found.routed, routed)

    def _described(self, row: Row, seed: int) -> dict[str, Any]:
        """What it cost and what it became."""
        found = self.trainer.trained(row, seed)
        said: dict[str, Any] = {"cpu_seconds": found.cpu_seconds, "loss": found.loss}
        said["changeable"] = sum(self.base[name].numel() for name in found.names)
        if row.settings.get("changes") != "own" and row.settings.get("masks") != "all":
            said |= masks_of(found)
        return said


def masks_of(found: Trained) -> dict[str, Any]:
    """Sparsity of each expert, the share of weights in their union, and their mean overlap beside that of chance."""
    deltas = found.model.deltas
    acting = torch.cat([(deltas.masks(name) != 0).flatten(1) for name in deltas.names], 1)
    density = acting.float().mean(1)
    overlap, chance = [], []
    for i in range(len(acting)):
        for j in range(i):
            overlap.append(float((acting[i] & acting[j]).sum() / (acting[i] | acting[j]).sum().clamp_min(1)))
            both = float(density[i] * density[j])
            chance.append(both / max(float(density[i] + density[j]) - both, 1e-9))
    said: dict[str, Any] = {"sparsity": (1 - density).tolist(), "union": float(acting.any(0).float().mean())}
    if overlap:
        said |= {"overlap": sum(overlap) / len(overlap), "overlap_by_chance": sum(chance) / len(chance)}
    return said


def plain(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.plain() for name, score in scores.items()}


def run(bench: Bench, cells: Cells, backwards: bool = False) -> None:
    """Everything, what matters most first; backwards only the other rows, beside a process that does the first."""
    first = bench.sizes.first_seed
    seeds = range(first, first + bench.sizes.seeds)
    if backwards:
        for row in (None, *MAIN):
            bench.tuned(cells, row, first)
        for row in reversed(MAIN[3:]):
            bench.direct(cells, row, seeds[-1])
        return
    cells.take("direct|pretrained|0", lambda: plain(bench.exams.fixed(None)))
    for seed in seeds:
        for row in MAIN[:3]:
            bench.direct(cells, row, seed)
            bench.dials(cells, row, seed)
        bench.ablations(cells, row_named(SMAT), seed)
        bench.routed_dials(cells, row_named(SMAT), seed)
    for row in MAIN[3:6]:
        bench.direct(cells, row, first)
    for row in (None, *MAIN[:3]):
        bench.tuned(cells, row, first)
    for row in MAIN[6:]:
        bench.direct(cells, row, first)
    for name in CURVES:
        bench.curve(cells, row_named(name), first)
    for row in MAIN[3:]:
        bench.dials(cells, row, first)
    for row in LONG:
        bench.direct(cells, row, first)
        bench.curve(cells, row, first)
        bench.dials(cells, row, first)
    bench.routed_dials(cells, LONG[1], first)
    bench.alike(cells, LONG[1], first)
    for row in (*ROUTED, *MORE):
        bench.both_ways(cells, row, first)
    for seed in seeds[1:]:
        for row in MAIN[3:]:
            bench.direct(cells, row, seed)
            bench.dials(cells, row, seed)
        for row in (*LONG, *ROUTED, *MORE):
            bench.direct(cells, row, seed)
    bench.tuned(cells, row_named(PMF), first, 0.5)
    for row in MAIN[3:]:
        bench.tuned(cells, row, first)


def quick(folder: Path, data: Path, drawing: Drawing | None = None, first_seed: int = 0) -> Bench:
    """A few tasks, a few episodes, a backbone of random weights, small domains."""
    given = world(folder / "few_shot_quick.pt", data, 24, drawing)
    torch.manual_seed(0)
    model = empty_vit(Pretraining(width=16, layers=2))
    model.save_pretrained(folder / "few_shot_quick_vit")
    budget = Budget(tasks=6, accumulate=2, snapshots=(2,), fisher_tasks=2, experts=2)
    sizes = Sizes(episodes=3, routed_episodes=2, curve_episodes=2, tuned_episodes=1, seeds=1, first_seed=first_seed)
    return Bench(given, partial(opened, folder / "few_shot_quick_vit"), budget, sizes, folder / "few_shot_quick_rows")


def opened(folder: Path) -> nn.Module:
    """The pretrained backbone, read anew."""
    disable_progress_bar()
    return ViTModel.from_pretrained(folder, add_pooling_layer=False)


def home_of(cache: Path, drawing: Drawing, first_seed: int) -> Path:
    """Where cells, rows and domains lie: `cache` for the usual ones, a folder in it for each other choice."""
    if drawing == Drawing() and first_seed == 0:
        return cache
    name = hashlib.sha256(f"{drawing} {first_seed}".encode()).hexdigest()[:10]
    return cache / f"few_shot-{name}"


def compact(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells without each episode's accuracy: what the tables show is in the JSON beside them."""
    return {
        key: {name: [sum(v["accuracy"]) / len(v["accuracy"]), v["ece"]] for name, v in cell.items()}
        if not key.startswith("trained")
        else cell
        for key, cell in cells.items()
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, help="where the backbone lies; of other scripts, it is trained there first")
    parser.add_argument("--cache", type=Path, default=HOME, help="folder for drawn domains, trained rows and cells")
    parser.add_argument("--pretrain", action="store_true", help="train the backbone and end")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0, help="of meta-tuning and its episodes")
    parser.add_argument(
        "--draw-seed", type=int, default=0, help="which letters and fonts, and which classes are unseen"
    )
    styles = f"scripts of one domain, ', STYLE' of {', '.join(STYLES)}; may stand several times"
    parser.add_argument("--train-scripts", action="append", default=[], help=styles)
    parser.add_argument("--held-out-scripts", action="append", default=[], help=styles)
    parser.add_argument("--fonts", type=Path, default=FONTS, help="folder of .ttf files")
    parser.add_argument("--backwards", action="store_true", help="the last rows first, beside a second process")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows; no file of results is written")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the tables of what is in the cache")
    given = parser.parse_args()
    torch.set_num_threads(1)
    drawing = Drawing(tuple(given.train_scripts), tuple(given.held_out_scripts), given.fonts, given.draw_seed)
    drawing.domains()
    own = home_of(given.cache, drawing, given.first_seed)
    usual = drawing == Drawing()
    vit = given.out or (HOME if usual else own) / "few_shot_vit"
    record, file = RESULT if own == given.cache else own / "few_shot.json", own / "few_shot.jsonl"
    if given.report:
        print(json.loads(record.read_text("utf-8"))["markdown"] if not file.exists() else tables(Cells(file).found))
        return
    own.mkdir(parents=True, exist_ok=True)
    if given.quick:
        cells = Cells(None)
        run(quick(own, given.data, drawing, given.first_seed), cells)
        print(tables(cells.found))
        return
    started = time.process_time()
    drawn = world(own / "few_shot.pt", given.data, drawing=drawing)
    if given.pretrain:
        print(pretrain(vit, drawn.pretraining))
        return
    if not (vit / "config.json").exists():
        if usual:
            raise SystemExit(f"{vit} holds no backbone; train it with --pretrain.")
        pretrain(vit, drawn.pretraining)  # the usual one has seen signs that are kept for retention here
    sizes, budget = Sizes(seeds=given.seeds, first_seed=given.first_seed), Budget()
    bench = Bench(drawn, partial(opened, vit), budget, sizes, own / "few_shot_rows")
    cells = Cells(file, time.time() + 60 * given.minutes)
    if given.rows:
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for name in given.rows:
                bench.both_ways(cells, row_named(name), seed)
        return
    try:
        run(bench, cells, given.backwards)
    finally:
        cells.read()
        result = {"budget": asdict(budget), "sizes": asdict(sizes), "pretraining": asdict(Pretraining())}
        result |= {"markdown": tables(cells.found), "cells": compact(cells.found)}
        command = f"python -m benchmarks.few_shot {shlex.join(sys.argv[1:])}".strip() if record != RESULT else COMMAND
        write_json(record, {**surroundings(started), "command": command, **result})


if __name__ == "__main__":
    main()
