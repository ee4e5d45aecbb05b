"""`experts ...`: what is in a catalogue, and what goes in and out of it. Nothing asks; `remove` wants --yes."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixwright.cli import expert_export
from mixwright.cli.expert_text import measure, sign
from mixwright.cli.output import DryRun, Json, example, print_json, print_table

if TYPE_CHECKING:
    from mixwright.catalog.card import ExpertCard
    from mixwright.catalog.check import Finding
    from mixwright.catalog.store import Catalog

Folder = Annotated[Path, typer.Argument(metavar="CATALOG", help="Folder of the catalogue.")]
Expert = Annotated[str, typer.Argument(metavar="EXPERT", help="Id of an expert in it.")]
Experts = Annotated[list[str], typer.Argument(metavar="EXPERT...", help="Ids of experts in it.")]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="Folder or hub id of the backbone, to check the experts against it.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    experts = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look after the experts of a catalogue.")
    lines: dict[Callable[..., Any], tuple[str, ...]] = {
        add: ("mixwright experts add my-catalog adapters/law --backbone my-backbone --licence mit",
              "mixwright experts add my-catalog someone/law-lora --revision main --dry-run"),
        show_all: ("mixwright experts list my-catalog", "mixwright experts list my-catalog --json"),
        show: ("mixwright experts show my-catalog law",),
        check: ("mixwright experts check my-catalog", "mixwright experts check my-catalog law --backbone my-backbone"),
        measure: ("mixwright experts measure my-catalog law --backbone my-backbone --text law-held-out.jsonl",),
        sign: ("mixwright experts sign my-catalog law --backbone my-backbone --text law.jsonl",),
        diff: ("mixwright experts diff my-catalog law medicine",),
        disable: ("mixwright experts disable my-catalog law",),
        enable: ("mixwright experts enable my-catalog law",),
        retire: ("mixwright experts retire my-catalog law medicine",),
        restore: ("mixwright experts restore my-catalog law",),
        remove: ("mixwright experts remove my-catalog law --yes",),
    }  # fmt: skip
    for command, text in lines.items():
        name = "list" if command is show_all else command.__name__
        experts.command(name, epilog=example(*text), no_args_is_help=True)(command)
    experts.command("export", epilog=expert_export.EXAMPLE, no_args_is_help=True)(expert_export.export)
    app.add_typer(experts, name="experts", rich_help_panel="Make")


def add(
    catalog: Folder,
    source: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT adapter's folder, or its hub id.")],
    expert_id: Annotated[str | None, typer.Option("--id", help="Its id here; the adapter's name if left out.")] = None,
    backbone: BackboneOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence, as its card should say.")] = None,
    task: Annotated[str | None, typer.Option(help="What it is for, in words.")] = None,
    confirm_base: Annotated[
        bool, typer.Option("--confirm-base", help="The base model it names is this backbone, under another name.")
    ] = False,
    measured_on: Annotated[
        Path | None, typer.Option("--measure", help="Held-out text to measure its quality on; needs --backbone.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Check an adapter and copy it into the catalogue, which is made if it is not there.

    Everything in the adapter is honoured or refused by name; a refusal leaves the catalogue as it was.
    """
    from mixwright.catalog.store import Catalog

    if measured_on is not None and backbone is None:
        raise ValueError("--measure needs --backbone: quality is what an expert adds to its backbone.")
    shelf = Catalog(catalog)
    card = shelf.add(
        source,
        expert_id=expert_id,
        backbone=_backbone(backbone),
        revision=revision,
        licence=licence,
        task=task,
        confirm_base=confirm_base,
        dry_run=dry_run,
    )
    if measured_on is not None and backbone is not None and not dry_run:
        from mixwright.api import measure as run

        run(shelf, card.id, backbone=backbone, held_out=measured_on)
        card = shelf.card(card.id)
    if as_json:
        return print_json({"dry_run": dry_run, **asdict(card)})
    _print_card(card, "would be added" if dry_run else "active")
    if card.backbone is None:
        print("Not checked against a backbone yet: compose will, or give --backbone.")
    return None


def show_all(catalog: Folder, as_json: Json = False) -> None:
    """List every expert with its state, what it was measured to gain (nats per token), and a verdict from that."""
    from mixwright.catalog.curate import judge

    shelf = _open(catalog)
    states, cards = shelf.states(), shelf.cards(active=False)
    verdicts = {one.expert: one.verdict for one in judge(cards)}
    if as_json:
        bound = shelf.backbone
        listed = [{"state": states[card.id], "verdict": verdicts[card.id], **asdict(card)} for card in cards]
        return print_json({"backbone": bound and asdict(bound), "experts": listed})
    rows = [
        (
            card.id,
            states[card.id],
            "/".join(str(rank) for rank in sorted({site.rank for site in card.sites.values()})),
            len(card.sites),
            _routed_by(card),
            _gain(card),
            verdicts[card.id],
            card.licence,
            card.task,
        )
        for card in cards
    ]
    columns = ("expert", "state", "rank", "sites", "routed by", "gain", "verdict", "licence", "task")
    print_table(columns, rows, title=_title(shelf, len(cards)))
    return None


def show(catalog: Folder, expert: Expert, as_json: Json = False) -> None:
    """Show an expert's card: where it came from, what it adapts, what was measured, the hash of every file."""
    shelf = _open(catalog)
    card = shelf.card(expert)
    if as_json:
        return print_json({"state": shelf.states()[expert], **asdict(card)})
    _print_card(card, shelf.states()[expert])
    sites = [(path, site.d_in, site.d_out, site.rank, site.scale) for path, site in card.sites.items()]
    print_table(("site", "d_in", "d_out", "rank", "scale"), sites)
    print_table(
        ("file", "bytes", "sha256"), [(name, one.bytes, one.sha256) for name, one in sorted(card.files.items())]
    )
    return None


def check(
    catalog: Folder,
    expert: Annotated[str | None, typer.Argument(metavar="[EXPERT]", help="One expert; all if left out.")] = None,
    backbone: BackboneOption = None,
    as_json: Json = False,
) -> None:
    """Read every file again: hashes, contents, backbone, licence. Exit code 1 if an expert must not be used.

    With --backbone each expert is also run on it alone, and its output compared with what its factors say.
    """
    shelf = _open(catalog)
    model = _backbone(backbone)
    findings = shelf.check(expert, backbone=model)
    checked = [expert] if expert else list(shelf.ids(active=False))
    if model is not None:
        findings += _tried_alone(shelf, checked, model, findings)
    errors = sum(finding.level == "error" for finding in findings)
    if as_json:
        print_json({"checked": checked, "findings": [asdict(finding) for finding in findings]})
    else:
        if findings:
            rows = [(one.expert, one.level, one.code, one.message) for one in findings]
            print_table(("expert", "level", "code", "finding"), rows)
        print(f"{len(checked)} experts checked: {errors} errors, {len(findings) - errors} warnings.")
    if errors:
        raise typer.Exit(1)


def diff(
    catalog: Folder,
    a: Annotated[str, typer.Argument(metavar="EXPERT", help="One expert.")],
    b: Annotated[str, typer.Argument(metavar="EXPERT", help="Another.")],
    as_json: Json = False,
) -> None:
    """Compare two experts: settings, sites, and the update that each makes at every common site."""
    found = _open(catalog).diff(a, b)
    if as_json:
        return print_json(asdict(found))
    if found.settings:
        rows = [(name, str(ours)[:60], str(theirs)[:60]) for name, (ours, theirs) in found.settings.items()]
        print_table(("setting", a, b), rows)
    for name, sites in ((a, found.only_a), (b, found.only_b)):
        if sites:
            print(f"Only {name} adapts {len(sites)} sites: {', '.join(sites[:4])}{' ...' if len(sites) > 4 else ''}")
    rows = [(path, one.cosine, one.norm_a, one.norm_b, one.norm_difference) for path, one in found.sites.items()]
    print_table(("site", "cosine", f"|{a}|", f"|{b}|", "|difference|"), rows)
    print(f"Cosine of the whole updates: {found.cosine:.3f}")
    return None


def disable(catalog: Folder, experts: Experts, as_json: Json = False) -> None:
    """Leave experts out of compositions until they are enabled."""
    _change(catalog, experts, "disable", as_json)


def enable(catalog: Folder, experts: Experts, as_json: Json = False) -> None:
    """Bring disabled experts back."""
    _change(catalog, experts, "enable", as_json)


def retire(catalog: Folder, experts: Experts, as_json: Json = False) -> None:
    """Take experts out of use for good, keeping their files."""
    _change(catalog, experts, "retire", as_json)


def restore(catalog: Folder, experts: Experts, as_json: Json = False) -> None:
    """Bring retired experts back: they are active again."""
    _change(catalog, experts, "restore", as_json)


def remove(
    catalog: Folder,
    experts: Experts,
    yes: Annotated[bool, typer.Option("--yes", help="Delete the files; there is no way back.")] = False,
    as_json: Json = False,
) -> None:
    """Delete experts and their files from the catalogue."""
    if not yes:
        raise ValueError(f"this deletes the files of {', '.join(experts)}; say --yes, or use `experts retire`.")
    _change(catalog, experts, "remove", as_json)


def _change(folder: Path, experts: list[str], verb: str, as_json: bool) -> None:
    shelf = _open(folder)
    known = shelf.states()
    for expert in experts:
        if expert not in known:
            shelf.card(expert)  # says what is there; nothing has been changed yet
    for expert in experts:
        getattr(shelf, verb)(expert)
    states = shelf.states()
    if as_json:
        return print_json({"states": {expert: states.get(expert, "removed") for expert in experts}})
    for expert in experts:
        print(f"{expert}: {states.get(expert, 'removed')}")
    return None


def _open(folder: Path) -> "Catalog":
    from mixwright.catalog.store import Catalog

    if not folder.is_dir():
        raise FileNotFoundError(2, "there is no such catalogue", str(folder))
    return Catalog(folder)


def _backbone(name: str | None) -> Any:
    if name is None:
        return None
    from mixwright.backbones.hf import load_backbone

    return load_backbone(name)


def _tried_alone(shelf: "Catalog", experts: list[str], backbone: Any, known: "list[Finding]") -> "list[Finding]":
    """What the self-check finds of the experts that have passed so far."""
    from mixwright.catalog.check import Finding
    from mixwright.composition.trial import try_alone
    from mixwright.errors import CatalogError

    found: list[Finding] = []
    failed = {finding.expert for finding in known if finding.level == "error"}
    for expert in experts:
        try:
            if expert not in failed:
                try_alone(backbone, expert, shelf.expert(expert).factors)
        except CatalogError as error:
            found.append(Finding(expert=expert, level="error", code=error.code, message=error.message))
    return found


def _print_card(card: "ExpertCard", state: str) -> None:
    source = card.source.name + (f"@{card.source.revision[:12]}" if card.source.revision else "")
    targets = card.targets if isinstance(card.targets, str) else ", ".join(card.targets)
    facts: list[tuple[str, object]] = [
        ("state", state),
        ("task", card.task),
        ("licence", card.licence),
        ("source", f"{card.source.kind}: {source}"),
        ("base model", card.base_model),
        ("backbone", card.backbone),
        ("targets", targets if len(targets) <= 100 else f"{targets[:99]}…"),
        ("sites", len(card.sites)),
        ("rank, alpha", f"{card.rank}, {card.alpha:g}{' (rsLoRA)' if card.rslora else ''}"),
        ("dtype", card.dtype),
        ("gates", card.has_gates),
        ("signatures", card.has_signatures),
        ("added", card.added),
    ]
    facts += [(f"quality: {name}", _brief(value)) for name, value in card.quality.items()]
    facts += [(f"recipe: {name}", _brief(value)) for name, value in card.recipe.items()]
    print_table((card.id, ""), facts)


def _routed_by(card: "ExpertCard") -> str | None:
    return " ".join(["gates"] * card.has_gates + ["signature"] * card.has_signatures) or None


def _gain(card: "ExpertCard") -> object:
    from mixwright.catalog.curate import measured

    gain = measured(card, "gain")
    return None if gain is None else gain[0]


def _brief(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _title(shelf: "Catalog", count: int) -> str:
    bound = shelf.backbone
    name = f"backbone {bound.name or bound.fingerprint[:12]}" if bound else "no backbone seen yet"
    return f"{shelf.folder.name}: {count} experts, {name}"
