"""The domains that a recipe names, opened, and the episodes that are drawn from them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mixwright.backbones.image_settings import image_channels, image_side, reads_images
from mixwright.data.batches import Batches
from mixwright.data.collate import Tokenizer
from mixwright.data.domain_sources import Split, has_split, read_domain
from mixwright.data.domain_splits import split_classes
from mixwright.data.domains import Domain, Reader
from mixwright.data.encoded import Encoded
from mixwright.data.episode_batches import episode_batches, held_out_batches
from mixwright.data.episode_samplers import FixedEpisodes, VariableEpisodes, generator_of
from mixwright.data.images import ImageReader, pixels_for
from mixwright.data.pixels import PHOTOS, SHAPES, Pixels
from mixwright.data.texts import TextReader
from mixwright.recipe import DataConfig, EpisodeConfig, Source

_UNUSED = ("train", "tasks", "validation", "test", "general", "labels", "size_cap", "limit", "max_target_length")
_AUGMENTED = {"none": None, "shapes": SHAPES, "photos": PHOTOS}


@dataclass(frozen=True, kw_only=True)
class Domains:
    """What was read, by name: domains for training and for looking, and the support sets of new tasks."""

    train: Mapping[str, Domain]
    held_out: Mapping[str, Domain]
    new_tasks: Mapping[str, Domain]

    def all(self) -> list[Domain]:
        """Every one of them."""
        return [*self.train.values(), *self.held_out.values(), *self.new_tasks.values()]

    @property
    def hold_texts(self) -> bool:
        """Whether a tokenizer is needed."""
        return any(_kind(domain) == "texts" for domain in self.all())

    @property
    def hold_images(self) -> bool:
        """Whether it matters how the backbone wants its images."""
        return any(_kind(domain) == "images" for domain in self.all())


def read_domains(data: DataConfig, config: EpisodeConfig, seed: int) -> Domains:
    """Open all domains of a recipe. Raises ValueError naming the key, or the file, that is wrong."""
    unused = next((key for key in _UNUSED if getattr(data, key) is not None), None)
    if unused is not None:
        raise ValueError(
            f"recipe.data.{unused}: this method reads episodes; name its data under domains, held_out_domains and "
            "new_tasks."
        )
    if not data.domains and not data.new_tasks:
        raise ValueError("recipe.data.domains: missing; training draws episodes from domains (or new_tasks).")
    train = _by_name("domains", data.domains or {}, "train")
    held_out = {
        name: _named("domains", name, source, "validation")
        for name, source in (data.domains or {}).items()
        if has_split(source, "validation")
    }
    for name in train if config.held_out_classes else ():
        if name not in held_out:
            train[name], held_out[name] = split_classes(train[name], config.held_out_classes, seed)
    for name, source in (data.held_out_domains or {}).items():
        if name in held_out or name in train:
            raise ValueError(f"recipe.data.held_out_domains.{name}: data.domains has a domain of this name; rename it.")
        split: Split = "validation" if has_split(source, "validation") else "train"
        held_out[name] = _named("held_out_domains", name, source, split)
    return Domains(train=train, held_out=held_out, new_tasks=_by_name("new_tasks", data.new_tasks or {}, "train"))


def check_readable(domains: Domains, backbone: nn.Module) -> None:
    """Raises ValueError for texts where the backbone reads images, and the other way round."""
    wants_images = reads_images(backbone)
    for domain in domains.all():
        kind = _kind(domain)
        if (wants_images is True and kind == "texts") or (wants_images is False and kind == "images"):
            other = "images" if kind == "texts" else "texts"
            raise ValueError(
                f"domain {domain.name} holds {kind}, and the backbone reads {other}; take another of both."
            )


def readable(
    domains: Domains,
    config: EpisodeConfig,
    backbone: nn.Module,
    *,
    images: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 512,
) -> Domains:
    """The domains as a backbone reads them, those for training augmented.

    `images`: the backbone's `preprocessor_config.json`; `length`: tokens of a text that are kept.
    """
    texts = None if tokenizer is None else TextReader(tokenizer, length)
    plain, varied = (partial(_reader, texts, _pixels(config, backbone, images, augmented=on)) for on in (False, True))

    def read(group: Mapping[str, Domain], reader: Callable[[Domain], Reader | None]) -> dict[str, Domain]:
        return {name: domain.with_reader(reader(domain)) for name, domain in group.items()}

    return Domains(
        train=read(domains.train, varied),
        held_out=read(domains.held_out, plain),
        new_tasks=read(domains.new_tasks, plain),
    )


def training_episodes(domains: Domains, config: EpisodeConfig, seed: int) -> Batches:
    """The episodes that are learned from."""
    source = _source(config, tuple(domains.train.values()), seed, augmented=config.augment != "none")
    length = sum(len(domain) for domain in domains.train.values())
    return episode_batches(source, length=length, digest=_digest(domains.train, config))


def held_out_episodes(domains: Domains, config: EpisodeConfig, seed: int) -> Batches:
    """The episodes that are looked at: the same ones each time, so many of each domain."""
    own = generator_of(seed, -1).initial_seed() % 2**31
    sources = {name: _source(config, (domain,), own, augmented=False) for name, domain in domains.held_out.items()}
    return held_out_batches(sources, config.held_out_episodes, _digest(domains.held_out, config))


def _source(
    config: EpisodeConfig, domains: tuple[Domain, ...], seed: int, *, augmented: bool
) -> FixedEpisodes | VariableEpisodes:
    try:
        if config.shots is not None:
            if not isinstance(config.ways, int):
                raise ValueError(f"ways {config.ways[0]} to {config.ways[1]}; with shots it is one number.")
            fixed = partial(FixedEpisodes, ways=config.ways, shots=config.shots, queries=config.queries)
            return fixed(domains=domains, seed=seed, augmented=augmented)
        return VariableEpisodes(
            domains=domains,
            ways=(config.ways, config.ways) if isinstance(config.ways, int) else config.ways,
            queries=config.queries,
            support=config.support,
            per_class=config.per_class,
            imbalance=config.imbalance,
            hierarchy=config.hierarchy,
            seed=seed,
            augmented=augmented,
        )
    except ValueError as error:
        raise ValueError(f"recipe.config.episodes: {error}") from error


def _reader(texts: TextReader | None, pixels: Callable[[], Pixels], domain: Domain) -> Reader | None:
    """None for items that a backbone reads as they are."""
    kind = _kind(domain)
    if kind == "texts":
        if texts is None:
            raise ValueError(f"domain {domain.name} holds texts, and there is no tokenizer.")
        return texts
    if kind == "images":
        return pixels() if isinstance(domain.items, Tensor) else ImageReader(pixels())
    return None


def _pixels(
    config: EpisodeConfig, backbone: nn.Module, images: Mapping[str, Any] | None, *, augmented: bool
) -> Callable[[], Pixels]:
    return partial(
        pixels_for,
        images,
        size=config.image_size or (None if images else image_side(backbone)),
        channels=image_channels(backbone),
        augmentation=_AUGMENTED[config.augment] if augmented else None,
    )


def _kind(domain: Domain) -> str:
    """images, texts, or values that are read as they are."""
    if isinstance(domain.items, Tensor):
        return "images" if domain.items.dim() == 4 and not domain.items.is_floating_point() else "values"
    first = None if isinstance(domain.items, Mapping) else domain.items[0]
    return "images" if isinstance(first, Encoded) else "texts" if isinstance(first, str) else "values"


def _digest(domains: Mapping[str, Domain], config: EpisodeConfig) -> str:
    """A name for the data and how they are read; what a tokenizer or `preprocessor_config.json` says is in it."""
    said = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, domain in domains.items():
        said.update(f"{name} {domain.digest} ".encode())
        probe = domain.read([domain.rows[domain.labels[0]][0]])
        for key, tensor in sorted(probe.items()) if isinstance(probe, Mapping) else [("", probe)]:
            said.update(f"{key} {tuple(tensor.shape)} ".encode())
            said.update(tensor.contiguous().numpy().tobytes())
    return said.hexdigest()


def _by_name(key: str, sources: Mapping[str, Source], split: Split) -> dict[str, Domain]:
    return {name: _named(key, name, source, split) for name, source in sources.items()}


def _named(key: str, name: str, source: Source, split: Split) -> Domain:
    if not name.strip():
        raise ValueError(f"recipe.data.{key}: a domain without a name.")
    try:
        return replace(read_domain(name, source, split=split), name=name)
    except ValueError as error:
        raise ValueError(f"recipe.data.{key}.{name}: {error}") from error
