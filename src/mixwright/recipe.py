"""The recipe: one YAML file that every verb reads, each taking the parts it needs.

```yaml
method: phatgoose
backbone: my-backbone            # a folder or a hub id
catalog: my-catalog
output_dir: runs/law
expert: {id: law, task: answer questions about contracts}
data: {train: law.jsonl, validation: law-held-out.jsonl}
train: {batch_size: 16}
config: {rank: 16, top_k: 2}     # the method's own settings: `mixwright schema phatgoose`
```

A method that trains a whole composition needs no catalogue and no expert; it may learn many tasks together
(`data: {tasks: {law: data/law, code: code.jsonl}}`) and start from what was saved before (`composition: FOLDER`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from mixwright.config import decode, override, read_yaml

Count = Annotated[int, Gt(0)]
Source = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen pretrained model. A bare string in a recipe is its `path`."""

    SHORTHAND: ClassVar[str] = "path"

    path: str
    """A folder or a hub id."""
    revision: str | None = None
    """Commit, tag or branch on the hub; None is the default branch."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; None keeps the one on disk."""
    kind: Literal["auto", "causal", "seq2seq", "speech", "encoder"] = "auto"
    """Which head to load: next token, target text, or none; auto reads the model's own configuration."""
    device_map: str | None = None
    """Passed to transformers as it is, for example auto or cuda:0."""


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """What is written on the card of the expert that is trained. A bare string in a recipe is its `id`."""

    SHORTHAND: ClassVar[str] = "id"

    id: str
    """Name in the catalogue."""
    task: str | None = None
    """What the expert is for, in words."""
    licence: str | None = None
    """Licence of the expert's weights, as an SPDX name."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that is trained and judged on. Each split is a JSONL file, several of them, or a hub data set."""

    train: Source | None = None
    """Training examples."""
    tasks: dict[str, Source] | None = None
    """Several tasks to be learned together, by name, in place of `train`. A folder has splits `train.jsonl` and, where
    checkpoints are to be chosen, `validation.jsonl`; `task.json` names its labels."""
    new_tasks: dict[str, Source] | None = None
    """Tasks with few examples to which a trained composition is carried over, by name."""
    domains: dict[str, Source] | None = None
    """For methods that read episodes, in place of `train`: domains of labelled images or texts, by name. Each is class
    folders, a .zip of them, a .jsonl, .csv or .tsv table, an .npz file, or a hub data set."""
    held_out_domains: dict[str, Source] | None = None
    """Domains on which it is only looked how well the method does, by name."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """A task's share of a mixture is proportional to its size to the power 1 / this: 1 is by size, large is uniform."""
    size_cap: Count | None = None
    """A task counts as no larger than this when shares are given out; None: no cap."""
    validation: Source | None = None
    """Held-out examples on which settings and checkpoints are chosen; those of `tasks` lie in their folders."""
    test: Source | None = None
    """Examples that only the final score sees."""
    format: Literal["auto", "prompt", "text", "label"] = "auto"
    """Keys of an example: prompt and completion, text, or text and label; auto looks at the first one."""
    max_length: Count = 512
    """Tokens of the input that are kept."""
    max_target_length: Count | None = None
    """Tokens of the target that are kept, for sequence-to-sequence models; None is `max_length`."""
    limit: Count | None = None
    """Examples that are read of each split, or of each task's; None is all."""
    labels: tuple[str, ...] | None = None
    """Texts of the labels, in the order of their numbers; None takes those that occur."""
    general: Source | None = None
    """General text on which an expert's harm is measured."""


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """Which episodes are drawn from domains, for methods that read them: `config.episodes`."""

    ways: Count | tuple[Count, Count] = (5, 50)
    """Classes of an episode: a number, or the fewest and the most."""
    shots: Count | None = None
    """Items of each class to learn from; None: they vary, as in Meta-Dataset, within `support` and `per_class`."""
    queries: Count = 10
    """Items of each class to be asked, at most half of the smallest class."""
    support: Count = 500
    """The most items to learn from."""
    per_class: Count = 100
    """A class counts as no larger than this when the size of the support is drawn."""
    imbalance: Annotated[float, Ge(1)] = 2.0
    """The most by which a class is over- or under-represented in the support."""
    weights: dict[str, Annotated[float, Gt(0)]] | None = None
    """How often each domain is drawn, by name, beside 1 for those not named."""
    hierarchy: bool = True
    """Whether the classes of an episode are of one group, where classes have groups. With `shots` they are of any."""
    augment: Literal["none", "shapes", "photos"] = "photos"
    """How training images are varied: cropped, mirrored and their colours moved; `shapes`, for writing and drawings,
    less so and never mirrored."""
    image_size: Count | None = None
    """The side of images in pixels; None: what the backbone was made for."""
    held_out_classes: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the classes of each training domain that is not trained on but looked at beside the held-out domains."""
    held_out_episodes: Count = 120
    """Episodes of each domain that is looked at, always the same ones."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training runs, whatever is trained; what a method prescribes (steps, rates) stands in its own config."""

    batch_size: Count = 16
    """Examples in one forward pass of one process."""
    accumulate: Count = 1
    """Forward passes per optimiser step."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision; trained weights stay fp32."""
    checkpoint_every: Count = 100
    """Optimiser steps between checkpoints: the most that an interrupted run loses."""
    log_every: Count = 10
    """Optimiser steps between lines of the log."""
    signature_batches: Annotated[int, Ge(0)] = 16
    """Training batches from which the expert's signature, or what each task's texts look like, is taken after
    training; 0 leaves none."""
    tracker: str | None = None
    """A tracker that accelerate knows (tensorboard, wandb, trackio); None sends nothing anywhere."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One YAML file that every verb reads."""

    backbone: BackboneConfig | None = None
    """The frozen pretrained model."""
    backbones: tuple[BackboneConfig, ...] = ()
    """Several pretrained models, for methods that compose them; in place of `backbone`."""
    method: str = "phatgoose"
    """How experts are composed: a name that `mixwright methods` prints."""
    catalog: str | None = None
    """Folder of the experts."""
    output_dir: str | None = None
    """Folder for what a verb leaves: checkpoints, a composition, scores, pages."""
    seed: Annotated[int, Ge(0)] = 0
    """Where all randomness starts."""
    expert: ExpertConfig | None = None
    """The expert that `train` makes, for methods that train experts one at a time."""
    composition: str | None = None
    """A saved composition (a folder or a hub id) from which training starts, for methods that train compositions."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How training runs."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """The method's own settings, decoded strictly by the method."""

    def sources(self, wanted: Literal["one", "several"] = "one") -> tuple[BackboneConfig, ...]:
        """The pretrained models that it names. Raises ValueError where there are not as many as its method takes."""
        if wanted == "one":
            if self.backbones:
                raise ValueError(f"recipe.backbones: {self.method} composes one model; name it under `backbone`.")
            if self.backbone is None:
                raise ValueError("recipe.backbone: missing; expected a folder or a hub id.")
            return (self.backbone,)
        if self.backbone is not None or len(self.backbones) < 2:
            given = "`backbone`" if self.backbone is not None else f"{len(self.backbones)}"
            raise ValueError(f"recipe.backbones: {given} given; {self.method} composes a list of two models or more.")
        return self.backbones


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with dotted settings such as `config.top_k=2` written over it.

    Raises:
        ValueError: the file cannot be read, or a key is unknown, missing or of the wrong type; every fault is named.
    """
    return decode(Recipe, override(read_yaml(path), settings), where=str(path))
