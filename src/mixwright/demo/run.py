"""The first run: from text on this machine to one routed model, with a table that says what it is worth."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixwright.api import compose
from mixwright.backbones.hf import load_backbone, load_tokenizer, without_bars
from mixwright.catalog.store import Catalog
from mixwright.demo import backbone as backbones
from mixwright.demo import compare, corpus, pool
from mixwright.demo.corpus import Domain
from mixwright.demo.mixed import MixedDocuments, mix
from mixwright.demo.pool import Folders
from mixwright.evaluation.explain import explain
from mixwright.evaluation.table import Table
from mixwright.report.page import explanation_page
from mixwright.report.terminal import print_explanation

if TYPE_CHECKING:
    from rich.console import Console

    from mixwright.composition.model import ComposedModel

DOCUMENTS = 64
EXPERTS = 6


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demo came to; `gains`: (expert, backbone's nats per token, expert's) on each expert's own text."""

    folder: Path
    domains: tuple[str, ...]
    corpus: str
    gains: list[tuple[str, float, float]]
    table: Table
    verdict: list[str]
    seconds: float


def demonstrate(
    folder: Path,
    console: "Console",
    *,
    steps: int = backbones.STEPS,
    experts: int = EXPERTS,
    fresh: bool = False,
    quiet: bool = False,
) -> Demonstration:
    """Run the demo in `folder`, printing as it goes. Parts that an earlier run left there are used again. `quiet`: no
    progress of the training.

    Raises ValueError where fewer than two domains have enough text on this machine.
    """
    with without_bars():
        return _demonstrate(Folders(folder), console, steps, experts, fresh=fresh, quiet=quiet)


def _demonstrate(
    folders: Folders, console: "Console", steps: int, experts: int, *, fresh: bool, quiet: bool
) -> Demonstration:
    began = time.monotonic()
    prose, domains = _find(console, experts)
    _prepare(folders, prose, domains, steps, fresh, console, quiet)
    for domain in domains:
        console.print(f"  expert [bold]{domain.name}[/bold] on {domain.what}")
        pool.make_expert(folders, domain, quiet=quiet)
    pool.retire_others(folders, domains)
    model, tokenizer = load_backbone(folders.backbone), load_tokenizer(folders.backbone)
    catalog = Catalog(folders.catalog)
    composed = compose("phatgoose", backbone=model, catalog=catalog)
    console.print(
        f"\n[bold]3. Compose[/bold]: {len(composed.experts)} experts at {len(composed.mixtures)} layers, checked"
    )
    ordered = [next(domain for domain in domains if domain.name == expert) for expert in composed.experts]
    gains = compare.gains(composed, ordered, tokenizer)
    documents = mix(ordered, tokenizer, DOCUMENTS)
    table = compare.compare(composed, catalog, documents)
    found = Demonstration(
        folder=folders.root,
        domains=tuple(domain.name for domain in domains),
        corpus=corpus.digest((prose, *domains)),
        gains=gains,
        table=table,
        verdict=compare.verdict(table),
        seconds=time.monotonic() - began,
    )
    _show_table(found, console)
    _show_document(composed, tokenizer, documents, table, folders, console)
    _leave(composed, found, folders)
    _next_steps(folders, console, time.monotonic() - began)
    return found


def _find(console: "Console", experts: int) -> tuple[Domain, Sequence[Domain]]:
    console.print("[bold]1. Look for text[/bold] on this machine; nothing is downloaded and nothing leaves it")
    prose = corpus.find(corpus.BASE)
    domains, short = corpus.find_all(experts)
    for domain in (prose, *domains):
        console.print(f"  {domain.name:<10} {domain.characters / 1e6:5.2f} MB  {domain.what}")
    for domain in short:
        console.print(f"  [dim]{domain.name:<10} {domain.characters / 1e6:5.2f} MB  too little, left out[/dim]")
    if len(domains) < 2 or not prose.train:
        raise ValueError(
            "the demo needs the standard library's sources and two kinds of text with 150 kB each beside the installed "
            f"packages; found: {', '.join(d.name for d in domains) or 'none'}. Use a full Python and torch from pip."
        )
    return prose, domains


def _prepare(
    folders: Folders,
    prose: Domain,
    domains: Sequence[Domain],
    steps: int,
    fresh: bool,
    console: "Console",
    quiet: bool,
) -> None:
    """A backbone of these texts, in a folder that holds no parts of others."""
    key = {"corpus": corpus.digest((prose, *domains)), "steps": steps, "domains": [d.name for d in domains]}
    known = json.loads(folders.parts.read_text(encoding="utf-8")) if folders.parts.is_file() else None
    console.print("\n[bold]2. Train the parts[/bold]")
    if known == key and not fresh:
        console.print("  backbone and experts of the last run are used again; --fresh makes new ones")
        return
    if folders.parts.is_file():
        for part in (folders.backbone, folders.catalog, folders.root / "runs"):
            shutil.rmtree(part, ignore_errors=True)
    folders.root.mkdir(parents=True, exist_ok=True)
    console.print(f"  backbone: a Llama of 0.9 million parameters, {steps} steps of Muon on {prose.what}")
    if not (folders.backbone / "config.json").is_file():
        backbones.make_backbone(folders.backbone, prose, domains, steps=steps, quiet=quiet)
    folders.parts.write_text(json.dumps(key), encoding="utf-8")


def _show_table(found: Demonstration, console: "Console") -> None:
    from rich import box
    from rich.table import Table as Grid

    console.print("\n  each expert on its own held-out text, nats per token: backbone -> expert")
    for name, before, after in found.gains:
        console.print(f"  {name:<10} {before:.2f} -> {after:.2f}")
    console.print(f"\n[bold]4. Compare[/bold] on {DOCUMENTS} held-out documents that change their domain half-way")
    means = found.table.intervals("nats")
    gaps = found.table.differences("nats", compare.MERGED)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("system", no_wrap=True)
    for column in ("nats/token", f"minus {compare.MERGED}, 95 %"):
        grid.add_column(column, justify="right", no_wrap=True)
    for system in sorted(means, key=lambda name: -means[name].value):
        if system in found.domains:
            continue
        mean, gap = means[system], gaps[system]
        style = "bold" if system == compare.ROUTED else None
        grid.add_row(system, f"{mean.value:.3f}", f"{gap.value:+.3f} ({gap.low:+.3f} .. {gap.high:+.3f})", style=style)
    console.print(grid)
    for line in found.verdict:
        console.print(f"  {line}", highlight=False)


def _show_document(
    model: "ComposedModel",
    tokenizer: object,
    documents: MixedDocuments,
    table: Table,
    folders: Folders,
    console: "Console",
) -> None:
    console.print("\n[bold]5. Look[/bold]: one of these documents, each token in the colour of its leading expert\n")
    explained = explain(model, tokenizer, compare.shown_document(documents, tokenizer, table))
    print_explanation(explained, console)
    folders.page.write_text(explanation_page(explained), encoding="utf-8")


def _leave(model: "ComposedModel", found: Demonstration, folders: Folders) -> None:
    model.save_pretrained(folders.composition)
    record = {
        "corpus": found.corpus,
        "domains": found.domains,
        "gains": [{"expert": name, "backbone": before, "expert_alone": after} for name, before, after in found.gains],
        "scores": found.table.records(),
        "verdict": found.verdict,
    }
    folders.scores.write_text(json.dumps(record, indent=2), encoding="utf-8")


def _next_steps(folders: Folders, console: "Console", seconds: float) -> None:
    console.print(f"\n[bold]Done[/bold] in {seconds:.0f} s. Left in {folders.root}:", highlight=False)
    for path, what in (
        (folders.composition, "the composed model"),
        (folders.catalog, "its experts, each a PEFT folder"),
        (folders.page, "the page of that document"),
        (folders.scores, "the table as JSON"),
        (folders.root / "recipes", "the recipes: one expert each"),
    ):
        console.print(f"  {path}  {what}", highlight=False, soft_wrap=True)
    console.print("Try next:")
    for command in (
        f"mixwright experts list {folders.catalog}",
        f"mixwright run {folders.composition} --prompt 'Permission is hereby granted' --trace",
        f"mixwright explain {folders.composition} --file pyproject.toml --output page.html",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
