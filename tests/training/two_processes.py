"""Run under torchrun: stage expert over all processes; the first one writes the factors to the path given."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.batches import make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.recipe import stages
from mixwright.recipe import TrainConfig
from mixwright.training.fit import fit
from mixwright.training.processes import process_state


def main(target: Path, accumulate: int) -> None:
    torch.set_num_threads(1)
    stage = stages(PhatgooseConfig(rank=4, alpha=4.0, expert_steps=5))[0]
    rows = tuple(Example("q" * (i + 1), target=c * (1 + i % 4)) for i, c in enumerate("abcdefgh"))
    batches = make_batches(
        TextTask("t", "prompt", rows), byte_tokenizer(), "causal", batch_size=2, seed=0, max_length=16
    )
    model = stage.build(tiny_backbone("llama", attention_dropout=0.1), 0, None)
    config = TrainConfig(accumulate=accumulate, checkpoint_every=2)
    fitted = fit(model, stage, batches, config=config, folder=target.with_suffix(".run"), validation=batches)
    if process_state().is_main_process:
        factors = stage.harvest(model).factors
        tensors = {f"{site}.{i}": factor[i] for site, factor in factors.items() for i in (0, 1)}
        save_file({**tensors, "losses": torch.tensor(fitted.losses)}, target)
    if process_state().num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
