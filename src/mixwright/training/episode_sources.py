"""The domains that a recipe names, opened, and the episodes that are drawn from them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

from mixwright.composition.domain_readers import DomainReaders
from mixwright.data.batches import Batches
from mixwright.data.domain_sources import Split, has_split, read_domain
from mixwright.data.domain_splits import split_classes
from mixwright.data.domains import Domain
from mixwright.data.episode_batches import episode_batches, held_out_batches
from mixwright.data.episode_samplers import FixedEpisodes, VariableEpisodes, generator_of
from mixwright.data.pixels import PHOTOS, SHAPES
from mixwright.recipe import DataConfig, EpisodeConfig, Source

_USED = ("domains", "held_out_domains", "new_tasks", "max_length")
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


def read_domains(data: DataConfig, config: EpisodeConfig, seed: int) -> Domains:
    """Open all domains of a recipe. Raises ValueError naming the key, or the file, that is wrong."""
    plain = DataConfig()
    keys = [field.name for field in fields(data) if field.name not in _USED]
    unused = next((key for key in keys if getattr(data, key) != getattr(plain, key)), None)
    if unused is not None:
        raise ValueError(
            f"recipe.data.{unused}: this method reads episodes, and has no use for it; its data are named under "
            "domains, held_out_domains and new_tasks."
        )
    if not data.domains and not data.new_tasks:
        raise ValueError("recipe.data.domains: missing; training draws episodes from domains (or new_tasks).")
    train = _by_name("domains", data.domains or {}, "train")
    for name, weight in (config.weights or {}).items():
        if name not in train:
            raise ValueError(f"recipe.config.episodes.weights.{name}: data.domains has no domain of this name.")
        train[name] = replace(train[name], weight=weight)
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


def readable(domains: Domains, config: EpisodeConfig, readers: DomainReaders) -> Domains:
    """The domains as a backbone reads them, those for training augmented."""
    augmenting = readers.augmenting(_AUGMENTED[config.augment])
    return Domains(
        train={name: augmenting.read(domain) for name, domain in domains.train.items()},
        held_out={name: readers.read(domain) for name, domain in domains.held_out.items()},
        new_tasks={name: readers.read(domain) for name, domain in domains.new_tasks.items()},
    )


def check_items(domains: Domains) -> None:
    """Read every item once. Raises ValueError naming the first that cannot be read."""
    for domain in domains.all():
        for row in range(len(domain)):
            domain.read([row])


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
