"""What a stage leaves in its folder: a composition, and the record that says which run it belongs to."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mixwright.composition.saving import ADDED, COMPOSITION
from mixwright.config import encode
from mixwright.files import sha256_bytes, sha256_file, write_atomic
from mixwright.training.fitted import Fitted
from mixwright.training.gates import Findings, read_findings
from mixwright.training.job import Job
from mixwright.training.run import stage_record
from mixwright.training.stage import Stage

FOLDER = "composition"
RECORD = "trained.json"


def folder_of(job: Job, name: str) -> Path:
    """Where the stage called `name` leaves its composition."""
    return job.folder / name / FOLDER


def has_left(job: Job, name: str) -> bool:
    """Whether the composition of this stage is there."""
    return (folder_of(job, name) / COMPOSITION).is_file()


def content_of(folder: Path | str) -> str:
    """A folder's content by a digest of its tensors, those of trained components included; a hub id by itself."""
    added = Path(folder) / ADDED
    if not added.is_file():
        return str(folder)
    more = sorted(path for path in Path(folder).rglob("*.safetensors") if path != added)
    if not more:
        return sha256_file(added)
    return sha256_bytes("".join(sha256_file(path) for path in (added, *more)).encode())


def run_of(job: Job, stage: Stage, identity: dict[str, str]) -> str:
    """The name of this run of this stage: a digest of all that it depends on."""
    text = json.dumps([job.run, stage.name, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_record(
    job: Job, stage: Stage, identity: dict[str, str], fitted: Fitted, findings: Findings, frozen: dict[str, Any] | None
) -> None:
    """Say that a stage is done; its composition, if it leaves one, is there already."""
    record = {
        "run": run_of(job, stage, identity),
        "added": content_of(folder_of(job, stage.name)) if stage.leaves else None,
        "method": job.recipe.method,
        "config": dict(job.recipe.config),
        "seed": job.recipe.seed,
        "train": encode(job.recipe.train),
        "data": identity,
        "stage": {**stage_record(stage, fitted), "held_out_losses": dict(fitted.held_out), "said": fitted.said},
        **({} if frozen is None else {"frozen": frozen}),
        **(findings.plain() if stage.examine is not None else {}),
    }
    _record(job, stage.name).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(_record(job, stage.name), json.dumps(record, indent=1).encode())


def read_record(job: Job, name: str) -> dict[str, Any]:
    """What is written down about a stage; empty where it has not run to its end."""
    try:
        return json.loads(_record(job, name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_done(job: Job, stage: Stage, identity: dict[str, str]) -> bool:
    """Whether the same run of this stage, from the same start, left what is there."""
    record = read_record(job, stage.name)
    if record.get("run") != run_of(job, stage, identity):
        return False
    if not stage.leaves:
        return True
    return has_left(job, stage.name) and record.get("added") == content_of(folder_of(job, stage.name))


def refuse_failed(job: Job, stage: Stage) -> None:
    """Raises ValueError where the record of a stage that `stops` has a gate that was not passed."""
    failed = read_findings(read_record(job, stage.name)).failed() if stage.stops else ()
    if failed:
        kept = f" What it left is kept in {folder_of(job, stage.name)}." if stage.leaves else ""
        raise ValueError(
            f"stage {stage.name}: {failed[0].said}{kept} The numbers are in {_record(job, stage.name)}. Change the "
            "settings and start over with force; or let failed gates warn, and go on with resume and force."
        )


def _record(job: Job, name: str) -> Path:
    return folder_of(job, name).parent / RECORD
