"""Looking at an expert again: is it still what was added, does it fit, may it be used?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixwright.catalog.adapter import build_expert
from mixwright.catalog.admission import site_cards
from mixwright.catalog.bundle import Bundle, read_bundle
from mixwright.catalog.card import CARD, ExpertCard
from mixwright.catalog.compare import product
from mixwright.catalog.fit import LinearSite, fit_card
from mixwright.catalog.folder import Folder
from mixwright.catalog.refusal import quote, refuse
from mixwright.catalog.shelf import Binding
from mixwright.errors import CatalogError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a check found. An error: the expert must not be used. A warning: for a person to weigh."""

    expert: str
    level: Literal["error", "warning"]
    code: str
    message: str


def open_bundle(folder: Folder, expert_id: str) -> tuple[Bundle, ExpertCard]:
    """A stored expert with its card, every file checked against its hash. Raises CatalogError."""
    bundle = read_bundle(folder)
    if bundle.card is None:
        raise refuse("HASH", folder.where, f"its {CARD} is missing. Restore it from a copy, or remove the expert.")
    if bundle.card.id != expert_id or bundle.card.sites != site_cards(bundle):
        raise refuse("HASH", folder.where, "its card describes another expert. Restore it from a copy, or remove it.")
    return bundle, bundle.card


def check_expert(
    folder: Folder, expert_id: str, binding: Binding | None, sites: Mapping[str, LinearSite] | None
) -> list[Finding]:
    """Everything that can be said of one stored expert: errors first."""

    def finding(level: Literal["error", "warning"], code: str, message: str) -> Finding:
        return Finding(expert=expert_id, level=level, code=code, message=message)

    try:
        bundle, card = open_bundle(folder, expert_id)
        expert = build_expert(expert_id, bundle, card, folder.where)
        if sites is not None:
            fit_card(card, sites)
    except CatalogError as error:
        notes = [finding("error", *note.split(" ", 1)) for note in getattr(error, "__notes__", ())]
        return [finding("error", error.code, error.message), *notes]
    found: list[Finding] = []
    if binding is not None and card.backbone not in (None, binding.fingerprint) and not card.base_confirmed:
        found.append(finding("error", "BASE", "its card names another backbone than the catalogue's."))
    if card.backbone is None:
        found.append(finding("warning", "BASE", "it was never checked against a backbone; compose will."))
    if not card.licence:
        found.append(finding("warning", "LICENCE", "no licence is recorded; set one with attach(licence=...)."))
    if not card.has_gates and not card.has_signatures:
        found.append(finding("warning", "GATES", "it has neither gates nor signatures; routing needs one of them."))
    if all(product(factors, factors) == 0 for factors in expert.factors.values()):
        found.append(finding("warning", "INERT", "every update is zero: it was never trained, and does nothing."))
    for name in sorted(folder.names() - set(bundle.files) - {CARD}):
        found.append(finding("warning", "FILES", f"{quote(name)} is none of its files, and is not used."))
    return found
