"""`explain` on a pool of sparse experts: what it changes, and what support sets in folders or tables make of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixwright.composition.episodic import EpisodicModel
    from mixwright.composition.support import Labelled
    from mixwright.data.domains import Domain
    from mixwright.evaluation.pool import Pool
    from mixwright.evaluation.pool_episode import PoolEpisode
    from mixwright.routing import Routing


def explained_pool(
    model: "EpisodicModel", supports: Sequence[str], query: str | None, limit: int, length: int
) -> tuple["Pool", list["PoolEpisode"]]:
    """The pool, with a mixture for each support set; with `query`, measured on these items. Raises ValueError.

    `limit`: items of a class that are taken at most; `length`: tokens of a text.
    """
    from mixwright.evaluation.pool import pool_of
    from mixwright.evaluation.pool_episode import explain_episode

    if query is not None and len(supports) != 1:
        raise ValueError("--query holds items of one task: give one --support with it.")
    tasks = {Path(source).name or source: source for source in supports}
    if len(tasks) < len(supports):
        raise ValueError("--support: two of them have one name; call their folders differently.")
    episodes: list[PoolEpisode] = []
    routed: dict[str, Routing] = {}
    for name, source in tasks.items():
        domain = _read(model, name, source, length)
        support, items = _labelled(domain, domain.class_names, limit)
        asked = None
        if query is not None:
            asked = _labelled(_read(model, "query", query, length), domain.class_names, limit)[0].support
        episodes.append(explain_episode(model, support, asked, name=name, items=items))
        routed[name] = model.settled_routing(support.support)
    return pool_of(model, routed, next(iter(routed), None)), episodes


def _read(model: "EpisodicModel", name: str, source: str, length: int) -> "Domain":
    from mixwright.composition.domain_readers import DomainReaders
    from mixwright.data.domain_sources import read_domain

    domain = read_domain(name, source)
    home = str(model.composition.backbone.get("path") or "")
    return DomainReaders.beside(model.backbone, home, [domain], length=length).read(domain)


def _labelled(domain: "Domain", classes: Sequence[str], limit: int) -> tuple["Labelled", list[str]]:
    """Items and names of a domain, each class by its place among `classes`."""
    import torch

    from mixwright.composition.support import Labelled
    from mixwright.routing import SupportSet

    unknown = [name for name in domain.class_names if name not in classes]
    if unknown:
        raise ValueError(f"--query: there is no class {unknown[0]!r} in the support set.")
    rows = [row for of_class in domain.rows for row in of_class[:limit]]
    labels = torch.tensor([list(classes).index(domain.class_names[domain.labels[row]]) for row in rows])
    names = [
        str(getattr(domain.items[row], "where", f"item {row}")) if _listed(domain) else f"item {row}" for row in rows
    ]
    return Labelled(SupportSet(domain.read(rows), labels), tuple(classes)), names


def _listed(domain: "Domain") -> bool:
    return isinstance(domain.items, Sequence)
