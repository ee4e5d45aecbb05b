"""Faulty support sets: wrong labels, missing classes, duplicates. Accuracy, and what the router doubts beside it.

python -m benchmarks.few_shot_robust   (after `few_shot`, whose backbone and trained rows it takes from --cache)

Episodes of 8 classes with 8 items each to learn from and 4 to be asked. `wrong`: that share of the support gets the
label of another class of the episode. `missing`: two classes have no support; accuracy is over the queries of the
others, `told apart` how often a query of a missing class is less sure than one of the others (0.5 is chance).
`duplicates`: seven of the eight items of each class are copies of the first. Doubt is `model.route`'s: entropy of the
mixture, its movement over resampled supports, and novelty against 200 tasks of meta-training.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.few_shot import HOME, opened
from benchmarks.few_shot_backbone import pixels
from benchmarks.few_shot_exam import Rows, Weights, averaged
from benchmarks.few_shot_glyphs import World, world
from benchmarks.few_shot_rows import PMF, SMAT, Budget, Trainer, row_named
from benchmarks.few_shot_tables import said
from benchmarks.record import surroundings, write_json
from mixwright.composition.routes import remember_tasks
from mixwright.data.domains import tensor_domain
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.evaluation.table import markdown
from mixwright.ops.prototypes import Centre, centres, cosine_scores
from mixwright.routing import SupportSet

RESULT = Path("benchmarks/results/few_shot_robust.json")
DOMAINS = ("latin", "held-out scripts", "omniglot", "digits")
WAYS, SHOTS, QUERIES, MISSING = 8, 8, 4, 2
WRONG = (0.1, 0.2, 0.4)
CONDITIONS = ("clean", *(f"{share:.0%} wrong" for share in WRONG), "missing classes", "duplicates")
CENTRES: tuple[Centre, ...] = ("mean", "median")


@dataclass(frozen=True)
class Faulty:
    """An episode with a fault; `known` says which queries are of a class that has support."""

    rows: Rows
    known: Tensor


def faulty(episode: Rows, condition: str, generator: torch.Generator) -> Faulty:
    """The episode with this fault."""
    labels, every = episode.labels, torch.ones(len(episode.asked), dtype=torch.bool)
    if condition.endswith("wrong"):
        count = round(float(condition.rstrip("% wrong")) / 100 * len(labels))
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        moved = labels.clone()
        moved[chosen] = (labels[chosen] + torch.randint(1, episode.ways, (count,), generator=generator)) % episode.ways
        return Faulty(replace(episode, labels=moved), every)
    if condition == "missing classes":
        there = labels < episode.ways - MISSING
        rows = replace(episode, support=episode.support[there], labels=labels[there])
        return Faulty(rows, episode.asked < episode.ways - MISSING)
    if condition == "duplicates":
        first = torch.stack([episode.support[labels == label][0] for label in range(episode.ways)])
        support = torch.where(torch.arange(len(labels)) % SHOTS == SHOTS - 1, episode.support, first[labels])
        return Faulty(replace(episode, support=support), every)
    return Faulty(episode, every)


class Bench:
    """The domains, P>M>F and SMAT as the comparison left them, and the tasks that SMAT remembers."""

    def __init__(self, given: World, trainer: Trainer, number: int, remembered: int = 200) -> None:
        self.given, self.number = given, number
        self.fixed, self.pool = (trainer.trained(row_named(name), 0) for name in (PMF, SMAT))
        source = trainer.episodes(0)
        remember_tasks(self.pool.model, (source.episode(index) for index in range(remembered)))

    def domain(self, name: str) -> dict[str, Any]:
        """All conditions and contenders on one domain."""
        pictures = self.given.tests[name]
        numbered = tensor_domain(name, torch.arange(len(pictures.images))[:, None], pictures.labels)
        source = FixedEpisodes(domains=[numbered], ways=WAYS, shots=SHOTS, queries=QUERIES, seed=11)
        known = {
            "pretrained": self.embedded(pictures.images, None),
            PMF: self.embedded(pictures.images, self.fixed.uniform()),
        }
        found: dict[str, Any] = {}
        for condition in CONDITIONS:
            for index in range(self.number):
                e: Any = source.episode(index)
                rows = Rows(e.support[:, 0], e.labels, e.query[:, 0], e.query_labels)
                given = faulty(rows, condition, torch.Generator().manual_seed(index))
                self._asked(pictures.images, known, condition, given, found)
        return found

    @torch.no_grad()
    def embedded(self, images: Tensor, weights: Weights | None) -> Tensor:
        """Features of images under some weights."""
        return self.fixed.model.settled_features(pixels(images), weights, batch_size=256)

    def _asked(
        self, images: Tensor, known: Mapping[str, Tensor], condition: str, given: Faulty, found: dict[str, Any]
    ) -> None:
        e, shots = given.rows, len(given.rows.labels)
        both = torch.cat([e.support, e.query])
        features = {name: embedded[both] for name, embedded in known.items()}
        route = self.pool.model.route(SupportSet(pixels(images[e.support]), e.labels), resamples=16)
        with torch.no_grad():
            features[SMAT] = self.embedded(images[both], self.pool.model.weights_for(route.routing))
        doubt = {
            "entropy": route.entropy,
            "spread": route.doubt,
            "novelty": route.novelty.share if route.novelty else 0.0,
        }
        for name, value in doubt.items():
            found.setdefault(f"{condition}|{name}", []).append(value)
        for name, embedded in features.items():
            for centre in CENTRES:
                prototypes = centres(embedded[:shots], e.labels, e.ways, centre)
                sure, guess = cosine_scores(embedded[shots:], prototypes).softmax(-1).max(-1)
                right = (guess == e.asked)[given.known].float().mean().item()
                found.setdefault(f"{condition}|{name}, {centre}", []).append(right)
                if not bool(given.known.all()):
                    gaps = sure[given.known][:, None] - sure[~given.known][None]
                    found.setdefault(f"{condition}|told apart|{name}, {centre}", []).append(
                        (gaps > 0).float().mean().item()
                    )


def tables(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Accuracy by condition, the router's doubt beside it."""
    contenders = [f"{name}, {centre}" for name in ("pretrained", PMF, SMAT) for centre in CENTRES]
    rows: list[list[str]] = []
    for condition in CONDITIONS:
        accuracy = [
            said(averaged([[[100 * v for v in cells[f"{condition}|{name}"]] for cells in found.values()]]))
            for name in contenders
        ]
        doubt = [
            f"{averaged([[cells[f'{condition}|{name}'] for cells in found.values()]]).value:.3f}"
            for name in ("entropy", "spread", "novelty")
        ]
        rows.append([condition, *accuracy, *doubt])
    heads = ["support", *contenders, "SMAT's entropy", "spread", "novelty"]
    apart = ", ".join(
        f"{name} {averaged([[cells[f'missing classes|told apart|{name}'] for cells in found.values()]]).value:.2f}"
        for name in contenders
    )
    title = f"{WAYS} classes of {SHOTS}, domains: {', '.join(found)}; prototypes by mean and by geometric median."
    return f"{title}\n\n{markdown(heads, rows)}\n\nQueries of missing classes told apart: {apart}."


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=HOME / "few_shot_vit", help="where the backbone lies")
    parser.add_argument("--cache", type=Path, default=HOME)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--report", action="store_true", help="print the table of the JSON")
    given = parser.parse_args()
    if given.report:
        print(json.loads(RESULT.read_text("utf-8"))["markdown"])
        return
    torch.set_num_threads(1)
    started, drawn = time.process_time(), world(given.cache / "few_shot.pt", given.data)
    trainer = Trainer(partial(opened, given.out), drawn.train, Budget(), given.cache / "few_shot_rows")
    bench = Bench(drawn, trainer, given.episodes)
    found = {name: bench.domain(name) for name in DOMAINS if name in drawn.tests}
    text = tables(found)
    print(text)
    means = {name: {key: sum(v) / len(v) for key, v in cells.items()} for name, cells in found.items()}
    where = {**surroundings(started), "command": f"python -m benchmarks.few_shot_robust --episodes {given.episodes}"}
    write_json(RESULT, {**where, "markdown": text, "domains": means})


if __name__ == "__main__":
    main()
