"""Which families of language models can be components: probed one by one, each in a process that may hang or die."""

import json
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["supported", "limited", "unsupported"]
LIMIT = 120.0
_BEGIN, _END = "<!-- families: made by `mixwright probe --all --report` -->", "<!-- families: end -->"
_PRELOADED = ["mixwright.methods.manticore.battery", "mixwright.backbones.family", "mixwright.backbones.hybrid"]


@dataclass(frozen=True, kw_only=True)
class FamilyReport:
    """What a probe found. `checks`: name -> why it does not hold, or None; empty where no model could be tried.

    `reason`: why the family is not supported in full, in a sentence; None where it is.
    """

    family: str
    verdict: Verdict
    reason: str | None
    checks: dict[str, str | None]
    seconds: float = 0.0


def probe(name: str) -> FamilyReport:
    """Try a family, or the family and switches of a model's folder, on a tiny random model, in this process.

    Raises ValueError for a name that is neither.
    """
    from mixwright.backbones.family import family_of, tiny_of
    from mixwright.methods.manticore.battery import CHECKS, ESSENTIAL, Bench

    start, family = time.perf_counter(), family_of(name)
    try:
        bench = Bench(tiny_of(name))
    except Exception as error:  # families refuse in their own ways
        return _unsupported(family, _short(error), start)
    checks: dict[str, str | None] = {}
    for check, run in CHECKS.items():
        try:
            checks[check] = run(bench)
        except Exception as error:  # likewise
            checks[check] = f"it fails: {_short(error)}"
    failed = [(check, reason) for check, reason in checks.items() if reason is not None]
    verdict: Verdict = "limited" if failed else "supported"
    if any(check in ESSENTIAL for check, _ in failed):
        verdict = "unsupported"
    told = "; ".join(f"{check}: {reason}" for check, reason in failed) or None
    return FamilyReport(family=family, verdict=verdict, reason=told, checks=checks, seconds=_since(start))


def probe_apart(names: Sequence[str], limit: float = LIMIT) -> Iterator[FamilyReport]:
    """`probe` of each name in a process of its own; one that hangs for `limit` seconds or dies is unsupported."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_PRELOADED)
    for name in names:
        start = time.perf_counter()
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(name, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            # The first process also waits for the imports that later ones share.
            yield (
                mine.recv() if mine.poll(limit) else _unsupported(name, f"no answer within {limit:.0f} seconds", start)
            )
        except EOFError:
            process.join(5)
            yield _unsupported(name, f"its process died (exit code {process.exitcode})", start)
        finally:
            process.kill()
            process.join()
            mine.close()


def table(reports: Sequence[FamilyReport]) -> str:
    """The reports as markdown: counts, the names of supported families, and a row per other one."""
    by: dict[str, list[FamilyReport]] = {"supported": [], "limited": [], "unsupported": []}
    for report in sorted(reports, key=lambda report: report.family):
        by[report.verdict].append(report)
    counts = ", ".join(f"{len(found)} {verdict}" for verdict, found in by.items())
    lines = [f"{len(reports)} families: {counts}.", "", f"Supported: {_names(by['supported'])}.", ""]
    lines += ["| family | verdict | what does not hold |", "|---|---|---|"]
    for verdict in ("limited", "unsupported"):
        lines += [f"| {r.family} | {verdict} | {(r.reason or '').replace('|', '/')} |" for r in by[verdict]]
    return "\n".join(lines)


def as_record(reports: Sequence[FamilyReport]) -> dict[str, Any]:
    """The reports and what they were made with, as plain data."""
    from importlib.metadata import version

    counts = {
        verdict: sum(r.verdict == verdict for r in reports) for verdict in ("supported", "limited", "unsupported")
    }
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"packages": packages, "counts": counts, "families": [asdict(report) for report in reports]}


def write_report(path: str, reports: Sequence[FamilyReport]) -> None:
    """Write reports to a file: `.json` gets the record, `.md` the table, in place of what is between its markers."""
    file = Path(path)
    if file.suffix == ".json":
        file.write_text(json.dumps(as_record(reports), indent=1) + "\n", "utf-8")
        return
    text = file.read_text("utf-8") if file.exists() else ""
    before, found, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2] if found else ""
    start = before if found or not before else before.rstrip("\n") + "\n\n"
    file.write_text(f"{start}{_BEGIN}\n{table(reports)}\n{_END}{after or chr(10)}", "utf-8")


def read_report(path: str) -> list[FamilyReport]:
    """The reports in a `.json` that `write_report` wrote; none where there is no such file.

    Raises ValueError for a file of another kind.
    """
    file = Path(path)
    if not file.exists():
        return []
    try:
        return [FamilyReport(**known) for known in json.loads(file.read_text("utf-8"))["families"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a report of `mixwright probe`, got something else ({error!r:.80})."
        ) from error


def _send(name: str, to: Connection) -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    # What a family warns of (slow paths, odd defaults) is not news about a tiny model.
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        to.send(probe(name))
    except ValueError as error:
        to.send(_unsupported(name, _short(error), time.perf_counter()))
    to.close()


def _names(reports: Sequence[FamilyReport]) -> str:
    return ", ".join(f"`{report.family}`" for report in reports) or "none"


def _unsupported(family: str, reason: str, start: float) -> FamilyReport:
    return FamilyReport(family=family, verdict="unsupported", reason=reason, checks={}, seconds=_since(start))


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _short(error: BaseException) -> str:
    text = getattr(error, "message", None) or str(error)
    return " ".join(text.split())[:300] or type(error).__name__
