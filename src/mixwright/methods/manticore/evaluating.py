"""Stage *evaluate*: is what was made better than the best single component and than their ensemble, at which cost?

Documents of the test part decide, if there is one; what is compared with what (the best component, the ensemble's
weights) is chosen on the validation part. Components are compared as they came, and tuned for as many steps as the
hybrid was, so that nothing is won by training alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from mixwright.composition.eval_mode import eval_mode
from mixwright.data.tasks import read_task
from mixwright.evaluation.hybrid_documents import Documents, documents_of, losses, per_token
from mixwright.evaluation.verdict import EQUAL_TOKENS, Verdict, best_of, verdict
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.controls import (
    AS_IT_CAME,
    PlainEnsemble,
    Size,
    best_ensemble,
    budgets,
    controls,
    size_of,
)
from mixwright.methods.manticore.cost import counting_length
from mixwright.methods.manticore.gates import at_most
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.vocabularies import of_one_vocabulary
from mixwright.recipe import Source
from mixwright.training.gates import Findings, Gate
from mixwright.training.job import Job
from mixwright.training.left import folder_of, has_left
from mixwright.training.progress import Report, reporting
from mixwright.training.run import take_apart

HYBRID, SOFT, ENSEMBLE = "hybrid", "soft hybrid", "logit ensemble"


@dataclass(frozen=True, kw_only=True)
class System:
    """What was measured: sums of nats by document of each part, and what every token costs."""

    name: str
    kind: str
    """hybrid, component or ensemble."""
    budget: str
    size: Size
    sums: Mapping[str, Float[Tensor, " documents"]]


@dataclass
class Exam:
    """The documents of each part, and every system on them."""

    parts: Mapping[str, Documents]
    systems: dict[str, System] = field(default_factory=dict[str, System])

    @property
    def choosing(self) -> str:
        """The part on which rivals are chosen."""
        return "validation" if "validation" in self.parts else next(iter(self.parts))

    @property
    def deciding(self) -> str:
        """The part whose verdict counts."""
        return "test" if "test" in self.parts else next(iter(self.parts))

    def loss(self, name: str, part: str) -> float:
        """Nats per token of a system."""
        return per_token(self.systems[name].sums[part], self.parts[part].tokens.sum(-1))

    def add(self, name: str, kind: str, budget: str, size: Size, speaker: nn.Module) -> None:
        """Measure a system on every part."""
        with eval_mode(speaker):
            sums = {part: losses(speaker, documents).sum(-1) for part, documents in self.parts.items()}
        self.systems[name] = System(name=name, kind=kind, budget=budget, size=size, sums=sums)

    def best(self, kind: str, budget: str | None = None) -> str:
        """The system of a kind that is best on the choosing part."""
        among = [one.name for one in self.systems.values() if one.kind == kind and budget in (None, one.budget)]
        return best_of({name: self.loss(name, self.choosing) for name in among})

    def compare(self, system: str, rival: str, budget: str) -> Verdict:
        """Paired, on the documents of the deciding part."""
        tokens = self.parts[self.deciding].tokens.sum(-1)
        ours, theirs = (self.systems[name].sums[self.deciding] / tokens for name in (system, rival))
        return verdict(ours, theirs, rival=rival, budget=budget, system=system, tokens=tokens)

    def plain(self) -> list[dict[str, Any]]:
        """A row for every system."""
        return [
            {
                "system": one.name,
                "kind": one.kind,
                "budget": one.budget,
                "parameters": one.size.parameters,
                "flops_per_token": one.size.flops,
                "loss": {part: self.loss(one.name, part) for part in self.parts},
            }
            for one in self.systems.values()
        ]


def open_exam(job: Job) -> Exam:
    """Validation and test texts of the recipe as documents. Raises ValueError where it has neither."""
    data = job.recipe.data
    sources: dict[Literal["validation", "test"], Source | None] = {"validation": data.validation, "test": data.test}
    if data.tasks is not None:
        raise ValueError("recipe.data.tasks: stage evaluate reads data.validation and data.test; give those.")
    parts: dict[str, Documents] = {}
    for part, source in sources.items():
        if source is not None:
            task = read_task(source, format=data.format, split=part, labels=data.labels, limit=data.limit)
            rows = job.recipe.train.batch_size
            parts[part] = documents_of([task], job.tokenizer, batch_size=rows, max_length=data.max_length)
    if not parts:
        raise ValueError("recipe.data.test: missing; stage evaluate needs texts to compare on (test or validation).")
    return Exam(parts)


def evaluate(model: HybridModel, job: Job, config: ManticoreConfig, quiet: bool) -> Findings:
    """Every system on every part, the verdicts, and what to hand over."""
    exam = open_exam(job)
    pretrained, tables = _rivals(model, job, config)
    runs = len(budgets(config, 1.0, 1.0)) * len(pretrained) + 2 + bool(config.discretise_steps)
    tokens = counting_length(model, job.recipe.data.max_length)
    with reporting("evaluate", runs, 0, quiet=quiet) as report:
        exam.add(HYBRID, "hybrid", "", size_of(model, tokens), model)
        report.step(1, None)
        if config.discretise_steps and has_left(job, "tune"):
            _add_soft(exam, job, tokens)
            report.step(len(exam.systems), None)
        weights = _add_others(exam, model, job, config, pretrained, _spent(exam, config), tokens, report)
    found = _findings(exam, model, config, weights)
    said = tuple(f"{name} is compared {how}." for name, how in tables.items())
    return replace(found, record={**found.record, "tables": tables}, sentences=(*said, *found.sentences))


def _rivals(model: HybridModel, job: Job, config: ManticoreConfig) -> tuple[Sequence[nn.Module], dict[str, str]]:
    """The components to compare with, all of the vocabulary that the texts are read in, and of each that came with
    another one where its new embedding and head are from."""
    pretrained = _modules(job)
    if not config.shared_vocabulary:
        return pretrained, {}
    rivals: Sequence[nn.Module] = of_one_vocabulary(config, pretrained, model.experts, None)
    others = [m for m, (one, own) in enumerate(zip(rivals, pretrained, strict=True)) if one is not own]
    how = "with the shared vocabulary, its new embedding and head as they were made of its own"
    if others and has_left(job, "align"):
        assert job.load is not None
        aligned = job.load(str(folder_of(job, "align")))
        assert isinstance(aligned, HybridModel)
        rivals = [aligned.components[m] if m in others else own for m, own in enumerate(pretrained)]
        how = "with the shared vocabulary, its new embedding and head as stage align left them"
    return rivals, {model.experts[m]: how for m in others}


def _modules(job: Job) -> Sequence[nn.Module]:
    assert isinstance(job.backbone, nn.ModuleList)
    return list(job.backbone)


def _spent(exam: Exam, config: ManticoreConfig) -> float:
    """Steps times FLOPs per token of the hybrid in *tune*, soft, and in *discretise*."""
    cut = exam.systems[HYBRID].size.run_flops
    soft = exam.systems[SOFT].size.run_flops if SOFT in exam.systems else cut
    return config.tune_steps * soft + config.discretise_steps * cut


def _called(component: str, budget: str) -> str:
    return f"{component} ({budget})"


def _add_soft(exam: Exam, job: Job, tokens: int) -> None:
    assert job.load is not None
    soft = job.load(str(folder_of(job, "tune")))
    try:
        assert isinstance(soft, HybridModel)
        exam.add(SOFT, "hybrid", "", size_of(soft, tokens), soft)
    finally:
        take_apart(soft)


def _add_others(
    exam: Exam,
    model: HybridModel,
    job: Job,
    config: ManticoreConfig,
    pretrained: Sequence[nn.Module],
    spent: float,
    tokens: int,
    report: Report,
) -> tuple[float, ...]:
    """The components and their ensemble, of those that had as many steps where there are such; its weights."""
    vocabulary = model.backbone.vocab_size
    together = AS_IT_CAME if config.controls == "none" else EQUAL_TOKENS
    kept: list[nn.Module] = []
    for number, budget, component in controls(job, config, pretrained, spent, tokens):
        name = _called(model.experts[number], budget)
        speaker = PlainEnsemble([component], [1.0], vocabulary)
        exam.add(name, "component", budget, size_of(component, tokens), speaker)
        report.step(len(exam.systems), None)
        if budget == together:
            kept.append(component)
    weights = best_ensemble(kept, exam.parts[exam.choosing], vocabulary)
    sizes = [size_of(one, tokens) for one, weight in zip(kept, weights, strict=True) if weight]
    flops = sum(size.flops for size in sizes)
    size = Size(parameters=sum(size.parameters for size in sizes), flops=flops, run_flops=flops)
    exam.add(ENSEMBLE, "ensemble", together, size, PlainEnsemble(kept, weights, vocabulary))
    report.step(len(exam.systems), None)
    return weights


def _findings(exam: Exam, model: HybridModel, config: ManticoreConfig, weights: Sequence[float]) -> Findings:
    fallback = exam.best("component")
    budgets_there = dict.fromkeys(one.budget for one in exam.systems.values() if one.kind == "component")
    verdicts = [exam.compare(HYBRID, exam.best("component", budget), budget) for budget in budgets_there]
    verdicts.append(exam.compare(HYBRID, ENSEMBLE, exam.systems[ENSEMBLE].budget))
    if SOFT in exam.systems:
        verdicts.append(exam.compare(HYBRID, SOFT, "the same data"))
    against = exam.compare(HYBRID, fallback, exam.systems[fallback].budget)
    chosen = HYBRID if against.word == "better" else fallback
    record = {
        "parts": {part: {"documents": len(d), "cut": list(d.cut)} for part, d in exam.parts.items()},
        "decided_on": exam.deciding,
        "chosen_on": exam.choosing,
        "systems": exam.plain(),
        "ensemble_weights": dict(zip(model.experts, weights, strict=True)),
        "verdicts": [one.as_json() for one in verdicts],
        "verdict": against.as_json(),
        "fallback": fallback,
        "hand_over": chosen,
    }
    advice = f"Hand over: {chosen}." if chosen == HYBRID else f"The fallback is the better choice: {fallback}."
    sentences = (*(one.sentence() for one in verdicts), advice)
    return Findings(record=record, gates=_acceptance(exam, against, fallback, config), sentences=sentences)


def _acceptance(exam: Exam, against: Verdict, fallback: str, config: ManticoreConfig) -> tuple[Gate, ...]:
    gates: list[Gate] = []
    if config.accept_difference is not None:
        what = f"held-out loss of the hybrid less that of {fallback}:"
        gates.append(
            at_most("difference", against.difference.value, config.accept_difference, what, "config.accept_difference")
        )
    if config.accept_discretised is not None and SOFT in exam.systems:
        lost = exam.loss(HYBRID, exam.deciding) - exam.loss(SOFT, exam.deciding)
        what = "held-out loss of the discretised hybrid less that of the soft one:"
        gates.append(at_most("discretising", lost, config.accept_discretised, what, "config.accept_discretised"))
    if config.accept_cost is not None:
        ratio = exam.systems[HYBRID].size.flops / exam.systems[fallback].size.flops
        what = f"FLOPs per token of the hybrid, without what acts nowhere, over those of {fallback}:"
        gates.append(at_most("cost", ratio, config.accept_cost, what, "config.accept_cost"))
    return tuple(gates)
