"""An expert's signature, taken from text such as it was trained on: no gradient, and no text is kept."""

from collections.abc import Sequence

from accelerate import PartialState
from torch import Tensor, nn

from mixwright.composition.signatures import collect_signatures
from mixwright.data.batches import Batches
from mixwright.data.collate import Batch
from mixwright.training.experts import Shelf
from mixwright.training.job import Job


def sign_expert(job: Job, shelf: Shelf) -> None:
    """Attach to the job's expert the backbone's activation statistics on `train.signature_batches` of its batches."""
    count = job.recipe.train.signature_batches
    if count and job.data is not None and PartialState().is_main_process:
        sites = list(shelf.catalog.card(shelf.expert.id).sites)
        signatures = signature_of(job.backbone, job.data, sites, most=count)
        shelf.catalog.attach(shelf.expert.id, signatures=signatures)


def signature_of(
    backbone: nn.Module, data: Batches, sites: Sequence[str], *, most: int | None = None
) -> dict[str, dict[str, Tensor]]:
    """Site -> signature of the backbone on one pass over `data`, or on its first `most` batches."""
    device = next(backbone.parameters()).device
    count = len(data.in_order())
    batches = (data.batch(index).to(device) for index in range(count if most is None else min(most, count)))
    return collect_signatures(backbone, map(_inputs, batches), sites)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {**batch.inputs, "labels": batch.targets} if batch.kind == "seq2seq" else dict(batch.inputs)
