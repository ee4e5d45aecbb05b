"""`explain` on a hybrid: what it is made of, whether it is worth it, and why it is as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixwright.cli.output import console

if TYPE_CHECKING:
    from mixwright.composition.ledger import Ledger
    from mixwright.composition.model import ComposedModel
    from mixwright.evaluation.hybrid import HybridExplanation
    from mixwright.evaluation.hybrid_documents import Documents


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a hybrid is to be measured on: files or one text, runs for its history, comparisons made elsewhere."""

    data: Sequence[str] = ()
    text: str | None = None
    runs: Sequence[Path] = ()
    verdicts: Sequence[Path] = ()
    sweeps: bool = True
    limit: int | None = 64
    batch_size: int = 16
    max_length: int = 512


def explained(
    model: "ComposedModel", tokenizer: Callable[[], Any], folder: Path, asked: Asked, *, quiet: bool
) -> "HybridExplanation":
    """Measure what was asked for; the licences are those of the ledger in the composition's folder."""
    from mixwright.composition.ledger import Ledger, read_entries
    from mixwright.evaluation.hybrid import explain_hybrid
    from mixwright.evaluation.hybrid_trajectories import recorded_verdicts, verdicts_in

    documents = _documents(tokenizer, asked)
    ledger = Ledger(tuple(read_entries(folder).values()))
    given = [one for file in asked.verdicts for one in verdicts_in(file)]
    from rich.progress import Progress

    with Progress(console=console(), transient=True, disable=quiet or documents is None) as bar:
        line = bar.add_task("measuring", total=None)
        return explain_hybrid(
            model,
            documents,
            runs=asked.runs,
            sweeps=asked.sweeps,
            licences=_licences(ledger),
            obligations=_obligations(ledger) if ledger.entries else (),
            verdicts=[*recorded_verdicts(asked.runs), *given],
            progress=lambda what: bar.update(line, advance=1, description=what),
        )


def _documents(tokenizer: Callable[[], Any], asked: Asked) -> "Documents | None":
    from mixwright.data.tasks import task_of
    from mixwright.evaluation.hybrid_documents import documents_of, read_documents

    sizes: dict[str, int] = {"batch_size": asked.batch_size, "max_length": asked.max_length}
    if asked.text is not None:
        return documents_of([task_of([{"text": asked.text}], name="the text")], tokenizer(), **sizes)
    return read_documents(asked.data, tokenizer(), limit=asked.limit, **sizes) if asked.data else None


def _licences(ledger: "Ledger") -> list[dict[str, Any]]:
    return [
        {
            "component": entry.component.name,
            "spdx": entry.licence.expression.spdx,
            "revision": entry.component.revision,
            "source": entry.licence.source,
            "gated": entry.gated,
            "used in": list(entry.component.used),
            "asks": list(entry.duties),
        }
        for entry in ledger.entries
    ]


def _obligations(ledger: "Ledger") -> list[str]:
    from mixwright.catalog.licence_terms import WORDS
    from mixwright.catalog.licences import NOT_LEGAL_ADVICE

    said = [f"Together: {ledger.expression.spdx}."]
    for duty in ledger.duties:
        whose = ", ".join(entry.component.name for entry in ledger.entries if duty in entry.duties)
        said.append(f"{duty}: {WORDS[duty]} ({whose}).")
    said += [f"Does not go together: {conflict.why}" for conflict in ledger.conflicts]
    return [*said, f"This is what was found, {NOT_LEGAL_ADVICE}."]
