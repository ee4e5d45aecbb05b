"""An expert's signature, taken in passing from the text that it was trained on: no gradient, and no text is kept."""

from accelerate import PartialState

from mixwright.composition.signatures import collect_signatures
from mixwright.training.job import Job


def sign(job: Job) -> None:
    """Attach to the job's expert the backbone's activation statistics on `train.signature_batches` of its batches."""
    count = job.recipe.train.signature_batches
    if count == 0 or not PartialState().is_main_process:
        return
    card = job.catalog.card(job.expert.id)
    device = next(job.backbone.parameters()).device
    batches = (job.data.batch(index).to(device) for index in range(count))
    labelled = job.kind == "seq2seq"
    inputs = ({**batch.inputs, "labels": batch.targets} if labelled else dict(batch.inputs) for batch in batches)
    job.catalog.attach(job.expert.id, signatures=collect_signatures(job.backbone, inputs, list(card.sites)))
