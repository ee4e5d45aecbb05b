"""Run under torchrun: a stage that trains a table by rows over all processes; each writes the model it ends with."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from table_model import table_model, table_stage

from mixwright.backbones.hf import byte_tokenizer
from mixwright.data.batches import make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.processes import process_state


def main(target: Path, accumulate: int, optimizer: str) -> None:
    torch.set_num_threads(1)
    rows = tuple(Example("q" * (i + 1), target=c * (1 + i % 4)) for i, c in enumerate("abcdefgh"))
    batches = make_batches(
        TextTask("t", "prompt", rows), byte_tokenizer(), "causal", batch_size=2, seed=0, max_length=16
    )
    model = table_model(query_norm="layer")  # micro-batches of one process have batch statistics of their own
    stage = table_stage(optimizer, choose_every=3)
    config = TrainConfig(accumulate=accumulate, checkpoint_every=2)
    fit(model, stage, batches, config=config, folder=target.with_suffix(".run"), validation=batches)
    save_file(model.state_dict(), target.with_suffix(f".{process_state().process_index}"))
    if process_state().num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
