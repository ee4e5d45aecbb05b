"""Stage *search*: which weight each component has in each block."""

from dataclasses import replace

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.enumerating import Found, search_grid, search_halving
from mixwright.methods.manticore.gates import search_gates
from mixwright.methods.manticore.losses import Reference, reference
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.noting import Notes, training_settings
from mixwright.methods.manticore.rewinding import keep_for_rewinding, on_copies
from mixwright.methods.manticore.searching import ENUMERATED, begin_search, end_search, search_groups, search_objective
from mixwright.methods.manticore.starting import fresh, pretrained_of, under
from mixwright.training.fitted import Fitted
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.stage import Objective, Stage


class Search:
    """Mixture weights are found (Roberts et al. 2024, stage 2), while everything learns or, one by one, by trying."""

    def __init__(self, config: ManticoreConfig) -> None:
        self.config = config
        self.notes = Notes()
        self.found: Found | None = None
        self.others: Reference | None = None

    def stage(self) -> Stage:
        """The stage."""
        config = self.config
        moving = config.search == "bilevel" or config.temperature_end != 1.0
        return Stage(
            **training_settings(config, chooses=not moving),
            name="search",
            steps=config.search_steps,
            build=self._build,
            choose_groups=lambda model: search_groups(model, config),
            prepare=self._prepare,
            own_way=self._one_by_one if config.search in ENUMERATED else None,
            finish=lambda model, job: end_search(model),
            examine=self._examine,
        )

    def _build(self, backbone: nn.Module, seed: int, before: ComposedModel | None) -> HybridModel:
        if before is None and self.config.align_steps:
            raise ValueError(
                "stage search starts from an aligned hybrid: run stage align first, or give recipe.composition. "
                "(config.align_steps: 0 searches without, for components that were never trained.)"
            )
        model = fresh(self.config, backbone, seed) if before is None else under(self.config, before)
        pretrained = pretrained_of(backbone)
        model = on_copies(model, pretrained)
        keep_for_rewinding(model, pretrained)
        begin_search(model, self.config)
        return self.notes.started(model, backbone)

    def _prepare(self, model: HybridModel, job: Job, quiet: bool) -> Objective:
        """Measure the components before they learn."""
        del quiet
        if self.config.search == "bilevel":
            refuse_overlap(job)
        self.others = None if job.validation is None else reference(model, job.validation)
        return search_objective(self.config, model, job.recipe.data.max_length)

    def _one_by_one(self, model: HybridModel, job: Job, quiet: bool) -> Fitted:
        config = self.config
        stage = replace(self.stage(), objective=self._prepare(model, job, quiet), prepare=None)
        search = search_grid if config.search == "grid" else search_halving
        self.found = search(model, job, stage, config, quiet=quiet)
        return self.found.fitted

    def _examine(self, model: HybridModel, job: Job, quiet: bool) -> Findings:
        del quiet
        more = {"reference": None if self.others is None else self.others.plain()}
        record = self.notes.record(model, job, **more, tried=None if self.found is None else self.found.plain())
        return Findings(record=record, gates=search_gates(record["held_out_loss"], self.others))


def refuse_overlap(job: Job) -> None:
    """Raises ValueError where mixture weights would learn on examples that the rest is trained on, or on none."""
    if job.validation is None or job.data is None:
        raise ValueError(
            "config.search=bilevel: mixture weights learn on data of their own; give data.validation, or use darts."
        )
    seen = {repr(example) for example in job.data.examples}
    shared = [at for at, example in enumerate(job.validation.examples) if repr(example) in seen]
    if shared:
        raise ValueError(
            f"config.search=bilevel: {len(shared)} of {len(job.validation)} examples of data.validation are in "
            f"data.train too, the first is number {shared[0]}; mixture weights must learn on others. Take them out."
        )
