"""The catalogue: experts at rest, in files that can be read and diffed, bound to one backbone.

An expert comes in by copy, after everything about it has been checked; a refusal leaves the catalogue as it was. Torch
is imported only where tensors are made, so that listing and changing states is quick.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixwright.catalog.admission import check_base, make_card
from mixwright.catalog.bundle import Bundle, parse_bundle, read_bundle
from mixwright.catalog.card import CARD, MAX_CARD, ExpertCard, Source, State, check_id, read_card, write_card
from mixwright.catalog.fit import fit_card
from mixwright.catalog.folder import open_folder
from mixwright.catalog.hub import HubClient, locate
from mixwright.catalog.refusal import quote, refuse
from mixwright.catalog.shelf import Binding, Manifest, Shelf
from mixwright.errors import CatalogError, IncompatibleExpert

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mixwright.catalog.adapter import Expert, LoraFactors
    from mixwright.catalog.check import Finding
    from mixwright.catalog.compare import Difference
    from mixwright.sites import Site


class Catalog:
    """A folder of experts for one backbone.

    `backbone` binds the catalogue to that model's fingerprint, or checks that it is the one it is bound to. Raises
    IncompatibleExpert (BASE) for another backbone, CatalogError for a folder that is no catalogue.
    """

    def __init__(self, folder: str | os.PathLike[str], backbone: "nn.Module | None" = None) -> None:
        self.folder = Path(folder).expanduser()
        self._shelf = Shelf(self.folder)
        self._binding: Binding | None = self._shelf.manifest().backbone
        self._sites: dict[str, Site] | None = None
        if backbone is not None:
            self.bind(backbone)

    @property
    def backbone(self) -> Binding | None:
        """The backbone that the catalogue is for, or None where it has seen none."""
        return self._shelf.manifest().backbone or self._binding

    def bind(self, backbone: "nn.Module") -> None:
        """Bind the catalogue to a backbone, or check it. Raises IncompatibleExpert (BASE)."""
        from mixwright.ops.digest import fingerprint
        from mixwright.sites import linear_sites

        name = getattr(getattr(backbone, "config", None), "_name_or_path", None)
        seen = Binding(fingerprint=fingerprint(backbone), name=name or None)
        self._check_binding(self.backbone, seen)
        self._binding, self._sites = seen, linear_sites(backbone)
        if self._shelf.exists() and self._shelf.manifest().backbone is None:
            with self._shelf.writing() as manifest:
                self._record_binding(manifest)

    # Reading

    def ids(self, active: bool = True) -> tuple[str, ...]:
        """The ids of the active experts, or of all, in order."""
        manifest = self._shelf.manifest()
        return tuple(one for one in self._shelf.ids() if not active or manifest.state(one) == "active")

    def states(self) -> dict[str, State]:
        """The state of every expert."""
        manifest = self._shelf.manifest()
        return {one: manifest.state(one) for one in self._shelf.ids()}

    def card(self, expert_id: str) -> ExpertCard:
        """An expert's card. Raises CatalogError (MISSING, HASH)."""
        return self._shelf.read(expert_id, lambda folder: read_card(folder.read(CARD, MAX_CARD), folder.where))

    def cards(self, active: bool = True) -> tuple[ExpertCard, ...]:
        """The cards of the active experts, or of all, in order."""
        return tuple(self.card(one) for one in self.ids(active))

    def expert(self, expert_id: str) -> "Expert":
        """An expert's tensors and card, in any state; every file is checked against its hash. Raises CatalogError."""
        from mixwright.catalog.adapter import build_expert

        bundle, card = self._load(expert_id)
        return build_expert(expert_id, bundle, card, f"expert {quote(expert_id)}")

    def check(self, expert_id: str | None = None, backbone: "nn.Module | None" = None) -> "list[Finding]":
        """Read everything again: hashes, contents, backbone, licence. Nothing found is an empty list."""
        from mixwright.catalog.check import check_expert

        if backbone is not None:
            self.bind(backbone)
        found: list[Finding] = []
        for one in (expert_id,) if expert_id is not None else self.ids(active=False):
            found += self._shelf.read(
                one, lambda folder, one=one: check_expert(folder, one, self.backbone, self._sites)
            )
        return found

    def diff(self, a: str, b: str) -> "Difference":
        """What sets two experts apart: settings, sites, and the update at each common site."""
        from mixwright.catalog.compare import difference

        return difference(self.expert(a), self.expert(b))

    # Writing

    def add(
        self,
        source: str | os.PathLike[str],
        *,
        expert_id: str | None = None,
        revision: str | None = None,
        backbone: "nn.Module | None" = None,
        licence: str | None = None,
        task: str | None = None,
        confirm_base: bool = False,
        dry_run: bool = False,
        hub: HubClient | None = None,
    ) -> ExpertCard:
        """Copy an adapter into the catalogue: a PEFT folder, or a hub id, which is pinned to its commit.

        With a `backbone` (here or in the constructor) it is also checked against its layers. Raises CatalogError with
        the code of what is wrong, IncompatibleExpert where it does not fit; further faults are notes of the exception.
        """
        from mixwright.catalog.adapter import build_expert

        if backbone is not None:
            self.bind(backbone)
        path, origin = locate(source, revision, hub)
        expert_id = check_id(expert_id or origin.name.rsplit("/", 1)[-1])
        where = f"adapter {quote(expert_id)}"
        with open_folder(path, where) as folder:
            try:
                bundle = read_bundle(folder)
            except FileNotFoundError as error:
                raise refuse("PATH", where, f"{quote(str(error.filename))} vanished while it was read.") from None
        binding = self.backbone
        card = make_card(
            bundle, expert_id, origin, binding=binding, confirm_base=confirm_base, task=task, licence=licence
        )
        build_expert(expert_id, bundle, card, where)
        return self._admit(bundle, card, dry_run=dry_run)

    def publish(
        self,
        expert_id: str,
        factors: "Mapping[str, LoraFactors]",
        *,
        peft_config: Mapping[str, Any],
        gates: "Mapping[str, Tensor] | None" = None,
        signatures: "Mapping[str, Mapping[str, Tensor]] | None" = None,
        task: str | None = None,
        licence: str | None = None,
        recipe: dict[str, Any] | None = None,
        quality: dict[str, Any] | None = None,
    ) -> ExpertCard:
        """Write a trained expert as a folder that PEFT opens; rank and alpha come from `factors`.

        Publishing the same bytes again under the same id changes nothing and is no error, so that a run that was killed
        may do it twice. Raises CatalogError as `add`.
        """
        from mixwright.catalog.adapter import build_expert
        from mixwright.catalog.export import adapter_files

        where = f"adapter {quote(check_id(expert_id))}"
        bundle = parse_bundle(adapter_files(factors, peft_config, gates, signatures), where)
        card = make_card(
            bundle,
            expert_id,
            Source(kind="trained", name=expert_id),
            binding=self.backbone,
            confirm_base=False,
            task=task,
            licence=licence,
            recipe=recipe,
            quality=quality,
        )
        build_expert(expert_id, bundle, card, where)
        return self._admit(bundle, card, same_is_fine=True)

    def attach(
        self,
        expert_id: str,
        *,
        gates: "Mapping[str, Tensor] | None" = None,
        signatures: "Mapping[str, Mapping[str, Tensor]] | None" = None,
        quality: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        task: str | None = None,
        licence: str | None = None,
    ) -> ExpertCard:
        """Add or replace what stands beside an expert's factors, in one step; what is None stays."""
        from mixwright.catalog.adapter import build_expert
        from mixwright.catalog.export import side_files

        with self._shelf.writing():
            bundle, card = self._load(expert_id)
            where = f"expert {quote(expert_id)}"
            changed = parse_bundle(bundle.files | side_files(gates, signatures), where)
            given = {"quality": quality, "recipe": recipe, "task": task, "licence": licence}
            changes = {name: value for name, value in given.items() if value is not None}
            card = card.with_files(changed.files, **changes)
            build_expert(expert_id, changed, card, where)
            self._shelf.replace(expert_id, changed.files | {CARD: write_card(card)})
        return card

    def disable(self, expert_id: str) -> None:
        """Leave an expert out of compositions until it is enabled. Raises CatalogError (MISSING, STATE)."""
        self._shelf.move(expert_id, {"active", "disabled"}, "disabled", "it is retired; restore it first")

    def enable(self, expert_id: str) -> None:
        """Undo `disable`. Raises CatalogError (MISSING, STATE)."""
        self._shelf.move(expert_id, {"active", "disabled"}, "active", "it is retired; restore it instead")

    def retire(self, expert_id: str) -> None:
        """Take an expert out of use for good, keeping its files. Raises CatalogError (MISSING)."""
        self._shelf.move(expert_id, {"active", "disabled", "retired"}, "retired", "")

    def restore(self, expert_id: str) -> None:
        """Undo `retire`: the expert is active. Raises CatalogError (MISSING, STATE)."""
        self._shelf.move(expert_id, {"active", "retired"}, "active", "it is disabled; enable it instead")

    def remove(self, expert_id: str) -> None:
        """Delete an expert and its files. Raises CatalogError (MISSING)."""
        with self._shelf.writing() as manifest:
            self._shelf.require(expert_id)
            self._shelf.discard(expert_id)
            self._shelf.set_state(manifest, expert_id, "active")

    def _load(self, expert_id: str) -> tuple[Bundle, ExpertCard]:
        from mixwright.catalog.check import open_bundle

        return self._shelf.read(expert_id, lambda folder: open_bundle(folder, expert_id))

    def _admit(
        self, bundle: Bundle, card: ExpertCard, *, dry_run: bool = False, same_is_fine: bool = False
    ) -> ExpertCard:
        """The last checks, and then, under the lock, the one rename that makes the expert part of the catalogue."""
        if self._sites is not None:
            fit_card(card, self._sites)
            card = replace(card, backbone=self._fingerprint())
        if dry_run:
            self._check_free(card.id)
            return card
        with self._shelf.writing() as manifest:
            if same_is_fine and card.id in self._shelf.ids() and self.card(card.id).files == card.files:
                return self.card(card.id)
            self._check_free(card.id)
            if (
                manifest.backbone is not None and manifest.backbone != self._binding
            ):  # another writer bound it meanwhile
                check_base(card, manifest.backbone, card.base_confirmed)
            if self._binding is None and card.backbone is not None:
                self._binding = Binding(fingerprint=card.backbone, name=card.base_model)
            self._shelf.publish(card.id, bundle.files | {CARD: write_card(card)})
            try:
                self._record_binding(manifest)
            except CatalogError:
                self._shelf.discard(card.id)
                raise
        return card

    def _fingerprint(self) -> str:
        assert self._binding is not None
        return self._binding.fingerprint

    def _check_free(self, expert_id: str) -> None:
        if expert_id in self._shelf.ids():
            message = "there is an expert of that id. Give another with expert_id, or remove the old one first."
            raise refuse("EXISTS", f"expert {quote(expert_id)}", message)

    def _check_binding(self, bound: Binding | None, seen: Binding) -> None:
        if bound is not None and bound.fingerprint != seen.fingerprint:
            ours, theirs = (quote(one.name or one.fingerprint[:12], 60) for one in (bound, seen))
            message = f"it is for the backbone {ours}; this one is {theirs}, with other weights. Use that backbone."
            raise IncompatibleExpert("BASE", self._shelf.where, message)

    def _record_binding(self, manifest: Manifest) -> None:
        """Write the backbone down, if one was seen and none is written yet. Called while writing."""
        if self._binding is None:
            return
        if manifest.backbone is None:
            self._shelf.write_manifest(replace(manifest, backbone=self._binding))
        else:
            self._check_binding(manifest.backbone, self._binding)
