"""Counting for good: usage that is kept with a composed model, saved with it, and goes on where it was left."""

import torch

from mixwright.composition.model import ComposedModel
from mixwright.evaluation.neuron_usage import UsageMeter

PREFIX = "usage"


def keep_usage(model: ComposedModel, *, detail: bool = False) -> UsageMeter:
    """Count every pass of `model` from now on, in tensors that `save_pretrained` writes; `detach` ends it.

    A model that was saved with counts goes on from them. Raises ValueError where they are of another grid.
    """
    meter = UsageMeter(model, detail=detail)
    for site in meter.names:
        for name, buffer in meter.meter(site).named_buffers():
            key = f"{PREFIX}.{site}.{name}"
            earlier = model.whole.get(key)
            if earlier is not None:
                if earlier.shape != buffer.shape:
                    meter.detach()
                    raise ValueError(
                        f"{key}: the counts that were kept have the shape {tuple(earlier.shape)}, this model needs "
                        f"{tuple(buffer.shape)}. Drop them (forget_usage) and count anew."
                    )
                buffer.copy_(earlier)
            model.whole[key] = buffer
    return meter


def forget_usage(model: ComposedModel) -> None:
    """Drop the counts that are kept with a model. What still counts goes on, unsaved."""
    for name in [name for name in model.whole if name.startswith(f"{PREFIX}.")]:
        del model.whole[name]


def kept_usage(model: ComposedModel) -> dict[str, torch.Tensor]:
    """Site -> how often each row was retrieved, as kept with the model; empty where nothing was."""
    rows = {name: t for name, t in model.whole.items() if name.startswith(f"{PREFIX}.") and name.endswith(".rows")}
    return {name.removeprefix(f"{PREFIX}.").removesuffix(".rows"): counts for name, counts in rows.items()}
