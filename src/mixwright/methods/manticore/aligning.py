"""Stage *align*: projectors learn to translate while components stand still; whether what these say can be kept."""

from pathlib import Path

from torch import nn

from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches
from mixwright.methods.manticore.cached_align import CachedAlign, Store, bytes_needed, tokens_of
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.fitting import fit_projectors
from mixwright.methods.manticore.gates import align_gates
from mixwright.methods.manticore.losses import reference
from mixwright.methods.manticore.model import HybridModel
from mixwright.methods.manticore.noting import Notes, training_settings
from mixwright.methods.manticore.parameters import LEAVE, PROJECTORS, WEIGHTS, present
from mixwright.methods.manticore.rewinding import on_copies
from mixwright.methods.manticore.starting import fresh, pretrained_of, under
from mixwright.methods.manticore.vocabularies import new_tables
from mixwright.training.gates import Findings
from mixwright.training.job import Job
from mixwright.training.objectives import supervised
from mixwright.training.stage import Objective, ParamGroup, Stage


class Align:
    """Projectors learn (Roberts et al. 2024, stage 1); components stand still, which is proved."""

    def __init__(self, config: ManticoreConfig) -> None:
        self.config = config
        self.notes = Notes()
        self.is_fresh = False

    def stage(self) -> Stage:
        """The stage."""
        config = self.config
        return Stage(
            **training_settings(config),
            name="align",
            steps=config.align_steps,
            build=self._build,
            choose_groups=self._groups,
            prepare=self._prepare,
            examine=self._examine,
        )

    def _groups(self, model: nn.Module) -> tuple[ParamGroup, ...]:
        assert isinstance(model, HybridModel)
        return align_groups(model, self.config, new_tables(model))

    def _build(self, backbone: nn.Module, seed: int, before: ComposedModel | None) -> HybridModel:
        self.is_fresh = before is None
        model = fresh(self.config, backbone, seed) if before is None else under(self.config, before)
        return self.notes.started(on_copies(model, pretrained_of(backbone)), backbone)

    def _prepare(self, model: HybridModel, job: Job, quiet: bool) -> Objective:
        """Projectors of least squares are fitted before the first step, unless they have learned already."""
        if self.is_fresh and self.config.projectors == "least_squares":
            assert job.data is not None
            fit_projectors(model, job.data)
        return align_objective(model, job, self.config, quiet=quiet)

    def _examine(self, model: HybridModel, job: Job, quiet: bool) -> Findings:
        del quiet
        others = None if job.validation is None else reference(model, job.validation)
        record = self.notes.record(model, job, reference=None if others is None else others.plain())
        return Findings(record=record, gates=align_gates(record["held_out_loss"], others, self.config))


def align_groups(model: nn.Module, config: ManticoreConfig, trained: tuple[str, ...] = ()) -> tuple[ParamGroup, ...]:
    """The projectors, and `trained`, such as new embeddings; the mixture weights too where the config says so."""
    assert isinstance(model, HybridModel)
    select = present(model, (*((LEAVE,) if config.align == "output" else PROJECTORS), *trained))
    if not select:
        raise ValueError("config.projectors: none, so that there is nothing to align; set config.align_steps: 0.")
    groups = [ParamGroup(select=select, lr=config.align_learning_rate, name="projectors")]
    if config.align_weights:
        rate = config.weights_learning_rate or 0.01
        groups.append(
            ParamGroup(select=present(model, WEIGHTS), lr=rate, weight_decay=0.0, clip=False, name="mixture weights")
        )
    return tuple(groups)


def why_not_cached(config: ManticoreConfig) -> str | None:
    """Why nothing can be kept under these settings; None where something can."""
    if config.shared_vocabulary:
        return "config.shared_vocabulary: new embeddings learn, and change what components read"
    if config.align != "output":
        return "config.align=full: the input projectors learn, and change what components read"
    if config.num_blocks > 1:
        return f"config.num_blocks={config.num_blocks}: later blocks read what learning projectors wrote"
    if config.align_weights:
        return "config.align_weights: learning mixture weights change what components read"
    if config.weights != "static":
        return f"config.weights={config.weights}: mixture weights are worked out in a pass"
    return None


def align_objective(model: HybridModel, job: Job, config: ManticoreConfig, *, quiet: bool) -> Objective:
    """From kept activations where the config asks for it and they fit, else by running the components in each step.

    Raises ValueError where they are asked for by name and can't be kept.
    """
    assert job.data is not None
    asked, reason = config.align_cache, why_not_cached(config)
    if asked == "off" or (asked == "auto" and reason is not None):
        return supervised
    if reason is not None:
        raise ValueError(f"config.align_cache={asked}: {reason}; set it to auto or off.")
    data: list[Batches] = [job.data, *([] if job.validation is None else [job.validation])]
    train = job.recipe.train
    if asked == "auto" and config.align_steps * train.batch_size * train.accumulate < 2 * len(job.data):
        return supervised  # most examples would be met once: nothing to gain
    tokens = tokens_of(data)
    needed = bytes_needed(model, tokens)
    if needed > config.align_cache_gib * 2**30:
        if asked == "auto":
            return supervised
        raise ValueError(
            f"config.align_cache_gib={config.align_cache_gib:g}: what the components say about {tokens} tokens takes "
            f"{needed / 2**30:.1f} GiB; allow that much, take less text, or set align_cache: off."
        )
    folder: Path | None = job.folder / "align" if asked == "disk" else None
    widths = dict(enumerate(model.backbone.widths))
    store = Store(widths, tokens, next(model.parameters()).dtype, folder)
    return CachedAlign(model, data, store, quiet=quiet)
