"""Stages *tune* and *discretise*: mixture weights stand still, everything that acts learns."""

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.gates import discretise_gates
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.noting import Notes, training_settings
from mixwright.methods.manticore.rewinding import forget, on_copies, rewound
from mixwright.methods.manticore.searching import component_groups
from mixwright.methods.manticore.starting import fresh, pretrained_of, under
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.left import read_record
from mixwright.training.stage import Stage


class Tune:
    """Components from their pretrained weights again, projectors from *align*, weights fixed (Roberts et al. 2024)."""

    def __init__(self, config: ManticoreConfig) -> None:
        self.config = config
        self.notes = Notes()

    def stage(self) -> Stage:
        """The stage."""
        return Stage(
            **training_settings(self.config),
            name="tune",
            steps=self.config.tune_steps,
            build=self._build,
            choose_groups=lambda model: component_groups(model, self.config),
            examine=lambda model, job, quiet: Findings(record=self.notes.record(model, job)),
        )

    def _build(self, backbone: nn.Module, seed: int, before: ComposedModel | None) -> HybridModel:
        config, pretrained = self.config, pretrained_of(backbone)
        if before is None and (config.align_steps or config.mixture_weights is None):
            raise ValueError(
                "stage tune starts from mixture weights that were found: run stages align and search first, or give "
                "recipe.composition."
            )
        model = fresh(config, backbone, seed) if before is None else under(config, before)
        if config.rewind and config.mixture_weights is None:
            model = rewound(model, pretrained)
        model = on_copies(model, pretrained)
        if config.mixture_weights is not None:
            model.mixture_weights = config.mixture_weights
        forget(model)
        return self.notes.started(model, backbone)


class Discretise:
    """One component for each row, the one with the largest weight, retrained. Not in the paper's headline runs."""

    def __init__(self, config: ManticoreConfig) -> None:
        self.config = config
        self.notes = Notes()

    def stage(self) -> Stage:
        """The stage."""
        return Stage(
            **training_settings(self.config),
            name="discretise",
            steps=self.config.discretise_steps,
            build=self._build,
            choose_groups=lambda model: component_groups(model, self.config),
            examine=self._examine,
        )

    def _build(self, backbone: nn.Module, seed: int, before: ComposedModel | None) -> HybridModel:
        if before is None:
            raise ValueError("stage discretise starts from a tuned hybrid: run stage tune first.")
        model = on_copies(under(self.config, before), pretrained_of(backbone))
        forget(model)
        model.discretise()
        return self.notes.started(model, backbone)

    def _examine(self, model: HybridModel, job: Job, quiet: bool) -> Findings:
        del quiet
        record = self.notes.record(model, job)
        soft = read_record(job, "tune").get("findings", {}).get("held_out_loss")
        return Findings(record=record, gates=discretise_gates(record["held_out_loss"], soft, self.config))
