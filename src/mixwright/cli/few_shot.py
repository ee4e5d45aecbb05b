"""`eval` and `run` for compositions that a support set adapts: scores beside the pretrained model, and classes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixwright.cli.composition import loaded
from mixwright.cli.output import console, print_json, print_table

if TYPE_CHECKING:
    from mixwright.composition.episodic import EpisodicModel
    from mixwright.data.domains import Domain

_SYSTEMS = ("pretrained", "adapted")


def reads_episodes(composition: Path) -> bool:
    """Whether the composition in a folder is of a method that reads episodes."""
    if not (composition / "composition.yaml").is_file():
        return False
    from mixwright.artifact import stored_at
    from mixwright.methods.base import load

    return load(stored_at(composition).method).reads == "episodes"


def evaluate_support(
    composition: Path, support: str | None, query: str | None, backbone: str | None, *, as_json: bool
) -> None:
    """Adapt to the items of one source and classify those of another."""
    if support is None or query is None:
        raise ValueError("give both --support and --query: labelled items to learn from, and items to be classified.")
    from mixwright.evaluation.episodes import calibration_error
    from mixwright.evaluation.intervals import bootstrap_mean, paired_difference
    from mixwright.methods.smat.classifier import FewShotClassifier

    model = _episodic(composition, backbone)
    known, asked = _readable(model, [support, query], backbone)
    if set(asked.class_names) - set(known.class_names):
        strange = sorted(set(asked.class_names) - set(known.class_names))[0]
        raise ValueError(f"{query}: class {strange!r} is not in {support} ({', '.join(known.class_names)}).")
    rows: dict[str, Any] = {}
    right: dict[str, Any] = {}
    for system, strength in zip(_SYSTEMS, (0.0, 1.0), strict=True):
        with FewShotClassifier(model, strength=strength) as classifier:
            classifier.fit(known.read(range(len(known))), [known.class_names[label] for label in known.labels])
            sure, hits = _answers(classifier, asked)
        right[system] = hits.float()
        found = bootstrap_mean(hits.float())
        rows[system] = {"accuracy": found.value, "low": found.low, "high": found.high}
        rows[system] |= {"ece": calibration_error(sure, hits)}
    gap = paired_difference(right["adapted"], right["pretrained"])
    difference = {"value": gap.value, "low": gap.low, "high": gap.high}
    route = model.route((known.read(range(len(known))), [known.class_names[label] for label in known.labels]))
    if as_json:
        experts = dict(zip(route.names, route.weights.tolist(), strict=True))
        print_json({"systems": rows, "difference": difference, "queries": len(asked), "experts": experts})
        return
    cells = [
        [system, f"{row['accuracy']:.3f}", f"{row['low']:.3f} .. {row['high']:.3f}", f"{row['ece']:.3f}"]
        for system, row in rows.items()
    ]
    print_table(["system", "accuracy", "95 %", "ECE"], cells, title=f"{len(known)} items learned, {len(asked)} asked")
    console().print(f"adapted - pretrained: {gap.value:+.3f} ({gap.low:+.3f} .. {gap.high:+.3f})\n", markup=False)
    console().print(str(route), markup=False)


def evaluate_domains(
    composition: Path,
    data: Sequence[str],
    backbone: str | None,
    *,
    ways: int,
    shots: int,
    episodes: int,
    seed: int,
    as_json: bool,
) -> None:
    """Score episodes of each domain, the same ones for the pretrained model and the adapted one."""
    from mixwright.data.episode_samplers import FixedEpisodes
    from mixwright.evaluation.episodes import direct, pretrained, score

    model = _episodic(composition, backbone)
    found: list[dict[str, Any]] = []
    for domain in _readable(model, data, backbone):
        source = FixedEpisodes(domains=(domain,), ways=ways, shots=shots, queries=10, seed=seed)
        before = score(pretrained(model), source, episodes)
        after = score(direct(model), source, episodes)
        mean, half = after.minus(before)
        gap = {"difference": mean, "difference_half_width": half}
        found.append({"domain": domain.name, "pretrained": before.plain(), "adapted": after.plain(), **gap})
    if as_json:
        print_json({"ways": ways, "shots": shots, "seed": seed, "domains": found})
        return
    columns = ["domain", *(f"{system}{part}" for system in _SYSTEMS for part in ("", " ECE")), "difference"]
    rows = [
        [
            row["domain"],
            *(cell for system in _SYSTEMS for cell in (_shown(row[system]), f"{row[system]['ece']:.3f}")),
            f"{row['difference']:+.3f} +- {row['difference_half_width']:.3f}",
        ]
        for row in found
    ]
    print_table(columns, rows, title=f"{composition}: accuracy of {episodes} episodes, {ways} ways, {shots} shots")


def classify(
    composition: Path, task: str | None, prompt: str | None, file: str | None, backbone: str | None, *, as_json: bool
) -> None:
    """The class of one text or picture, by a classifier that the composition remembers."""
    from mixwright.backbones.image_settings import reads_images
    from mixwright.methods.smat.classifier import FewShotClassifier

    if (prompt is None) == (file is None):
        raise ValueError("give one of --prompt TEXT and --file FILE, an image or a text.")
    model = _episodic(composition, backbone)
    known = ", ".join(model.adaptations)
    if task is None or task not in model.adaptations:
        raise ValueError(f"--task {task}: this composition remembers {known or 'no task; see stage adapt of train'}.")
    item: Any = prompt
    if file is not None:
        item = Path(file) if reads_images(model.backbone) else Path(file).read_text(encoding="utf-8")
    classifier = FewShotClassifier.from_model(model, task)
    (shares,) = classifier.predict_proba([item])
    order = shares.argsort()[::-1]
    ranked = [{"class": str(classifier.classes_[at]), "probability": float(shares[at])} for at in order]
    if as_json:
        print_json({"task": task, "classes": ranked})
        return
    print_table(["class", "probability"], [[row["class"], f"{row['probability']:.3f}"] for row in ranked])


def _episodic(composition: Path, backbone: str | None) -> "EpisodicModel":
    from mixwright.composition.episodic import EpisodicModel

    model = loaded(composition, backbone)
    assert isinstance(model, EpisodicModel)
    if backbone is not None:  # what lies beside it, tokenizer and settings, lies there now
        described = {**model.composition.backbone, "path": backbone, "revision": None}
        model.composition = replace(model.composition, backbone=described)
    return model.eval()


def _readable(model: "EpisodicModel", sources: Sequence[str], backbone: str | None) -> "list[Domain]":
    from mixwright.composition.domain_readers import DomainReaders
    from mixwright.data.domain_sources import read_domain

    recorded = model.composition.backbone
    domains = [read_domain(Path(source.partition("#")[0]).stem, source) for source in sources]
    home = backbone or str(recorded.get("path") or "")
    readers = DomainReaders.beside(model.backbone, home, domains, revision=recorded.get("revision"))
    return [readers.read(domain) for domain in domains]


def _answers(classifier: Any, asked: "Domain", batch: int = 64) -> tuple[Any, Any]:
    """How sure of each item, and whether rightly."""
    import torch

    sure, hits = [], []
    for first in range(0, len(asked), batch):
        rows = range(first, min(first + batch, len(asked)))
        shares = torch.from_numpy(classifier.predict_proba(asked.read(rows)))
        best, chosen = shares.max(-1)
        truth = [asked.class_names[asked.labels[row]] for row in rows]
        hits.append(torch.tensor([str(classifier.classes_[at]) == name for at, name in zip(chosen.tolist(), truth)]))
        sure.append(best)
    return torch.cat(sure), torch.cat(hits)


def _shown(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.3f}" + ("" if row["half_width"] is None else f" +- {row['half_width']:.3f}")
