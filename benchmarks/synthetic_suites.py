"""Three synthetic suites, two architectures, every baseline in one table: where PHATGOOSE wins and where it loses.

    python -m benchmarks.synthetic_suites

Backbones are trained from scratch to copy; experts, gates and a multitask adapter follow, eight experts side by side in
one forward. Trained parts are kept under --cache, so that evaluation can be repeated alone.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.pool_systems import OwnText, all_systems, composed_pool
from benchmarks.record import summary, surroundings, write_json
from benchmarks.side_by_side import Losses, Stages, train_experts, train_gates
from benchmarks.trained_pool import TrainedPool, random_weights
from mixwright.composition.model import ComposedModel
from mixwright.data.collate import IGNORED, Batch
from mixwright.data.synthetic import CipherTask, Examples, Language, Suite, copying, exclusive, mixing, overlapping
from mixwright.evaluation.evaluate import evaluate
from mixwright.evaluation.scores import TokenTask
from mixwright.evaluation.table import Table
from mixwright.sites import Site, linear_sites

WIDTH = 48
ROWS = 16
SLOWER = {("seq2seq", "overlapping"): 3}
"""Where experts need a multiple of the steps: three ciphers each, and T5 finds its alignment late."""
KINDS = {"causal": "Llama, 2 layers", "seq2seq": "T5, 2+2 layers"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/synthetic_suites"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/synthetic_suites.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--backbone-steps", type=int, default=800)
    parser.add_argument("--expert-steps", type=int, default=400, help="the paper: 1000")
    parser.add_argument("--gate-steps", type=int, default=100, help="the paper: 100")
    parser.add_argument("--examples", type=int, default=128, help="of each test task")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--again", action="store_true", help="evaluate although the cache has scores")
    return parser.parse_args()


def build(kind: str, language: Language, seed: int) -> nn.Module:
    """A fresh backbone, from a transformers configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    ids: dict[str, Any] = {"vocab_size": language.vocab_size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "seq2seq":
        shape = {"d_model": WIDTH, "d_kv": WIDTH // 4, "num_heads": 4, "d_ff": 2 * WIDTH, "num_layers": 2}
        start = {"decoder_start_token_id": 0, "tie_word_embeddings": False, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(**ids, **shape, **start)).eval()
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**ids, **shape, bos_token_id=0, max_position_embeddings=64, tie_word_embeddings=False)
    ).eval()


def as_batch(kind: str, examples: Examples) -> Batch:
    """What the backbone reads."""
    return examples.seq2seq() if kind == "seq2seq" else examples.causal()


def row_losses(model: Any, batch: Batch) -> Tensor:
    """The mean loss of each row's targets."""
    inputs: dict[str, Any] = dict(batch.inputs)
    if batch.kind == "seq2seq":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch.targets)
    logits = model(**inputs, use_cache=False).logits
    losses = cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(-1) / (batch.targets != IGNORED).sum(-1)


def train_backbone(kind: str, language: Language, steps: int, seed: int) -> nn.Module:
    """Learns to copy: Muon for matrices, AdamW for embeddings, head and norms, decaying to zero."""
    model = build(kind, language, seed)
    within = [p for n, p in model.named_parameters() if p.dim() == 2 and not _embeds(n)]
    outside = [p for n, p in model.named_parameters() if p.dim() != 2 or _embeds(n)]
    optimisers = [
        torch.optim.Muon(within, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(outside, lr=5e-3, weight_decay=0.0),
    ]
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * max(0.02, 1 - step / steps)
        for optimiser, full in zip(optimisers, (0.02, 5e-3), strict=True):
            optimiser.param_groups[0]["lr"] = full * rate
        examples = copying(language).sample(language, 64, 10**6 * (seed + 1) + step)
        loss = row_losses(model, as_batch(kind, examples)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    print(f"{kind} seed {seed} backbone: copying loss {float(loss.detach()):.4f}", flush=True)
    return model.eval()


def _embeds(name: str) -> bool:
    return any(part in name for part in ("embed", "shared", "lm_head", "relative"))


def side_by_side(kind: str, language: Language, tasks: tuple[CipherTask, ...], rows: int, first_seed: int) -> Losses:
    """The mean loss of each task's own rows, tasks one below the other."""

    def losses(model: ComposedModel, step: int) -> Tensor:
        drawn = [task.sample(language, rows, first_seed + 10_000 * at + step) for at, task in enumerate(tasks)]
        together = Examples(torch.cat([d.source for d in drawn]), torch.cat([d.target for d in drawn]))
        return row_losses(model, as_batch(kind, together)).reshape(len(tasks), rows).mean(1)

    return losses


def adapted_sites(backbone: nn.Module) -> dict[str, Site]:
    """Every linear layer of every block; not the head."""
    return {path: site for path, site in linear_sites(backbone).items() if "lm_head" not in path}


def train_pool(
    kind: str, language: Language, suite: Suite, backbone: nn.Module, args: argparse.Namespace, seed: int
) -> TrainedPool:
    """Experts, gates, a random expert's gate (on the first task), and a multitask adapter on all tasks' data."""
    sites, first = adapted_sites(backbone), 10**7 * (seed + 1)
    steps = args.expert_steps * SLOWER.get((kind, suite.name), 1)
    stages = Stages(expert_steps=steps, gate_steps=args.gate_steps)
    losses = side_by_side(kind, language, suite.experts, ROWS, first)
    parts, history = train_experts(backbone, sites, len(suite.experts), losses, stages, seed)
    gates = train_gates(backbone, parts, side_by_side(kind, language, suite.experts, ROWS, first + 5_000), stages)
    noise = random_weights(parts, seed)
    train_gates(backbone, noise, side_by_side(kind, language, suite.experts[:1], ROWS, first + 5_000), stages)
    everything = side_by_side(kind, language, suite.experts, ROWS // 2, first)
    multitask, joint = train_experts(
        backbone, sites, 1, lambda model, step: everything(model, step).mean().reshape(1), stages, seed + 100
    )
    print(
        f"{kind} seed {seed} {suite.name}: expert loss {history[-1]:.3f}, gate loss {gates[-1]:.3f}, "
        f"multitask loss {joint[-1]:.3f}",
        flush=True,
    )
    return TrainedPool(tuple(task.name for task in suite.experts), parts, noise, multitask)


def test_tasks(
    kind: str, language: Language, tasks: tuple[CipherTask, ...], count: int, first_seed: int
) -> list[TokenTask]:
    """Held-out examples of each task, in batches of 256."""
    found: list[TokenTask] = []
    for at, task in enumerate(tasks):
        examples = task.sample(language, count, first_seed + at)
        starts = range(0, count, 256)
        found.append(TokenTask(task.name, [as_batch(kind, examples[start : start + 256]) for start in starts]))
    return found


def own_text(kind: str, language: Language, suite: Suite, seed: int) -> OwnText:
    """64 training examples of each expert for averages and signatures, 128 for retrieval."""
    first = 10**7 * (seed + 1)
    drawn = [task.sample(language, 128, first + 10_000 * at) for at, task in enumerate(suite.experts)]
    return OwnText(
        [[as_batch(kind, examples[:64])] for examples in drawn], [[as_batch(kind, examples)] for examples in drawn]
    )


def run_seed(kind: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All three suites for one backbone: suite -> scores, and the settings chosen on validation."""
    language = Language(seed=seed)
    folder = args.cache / f"{kind}-seed{seed}-{args.backbone_steps}-{args.expert_steps}-{args.gate_steps}"
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "backbone.safetensors"
    if stored.exists():
        backbone = build(kind, language, seed)
        backbone.load_state_dict(load_file(stored))
    else:
        backbone = train_backbone(kind, language, args.backbone_steps, seed)
        save_file({name: t.contiguous().clone() for name, t in backbone.state_dict().items()}, stored)
    scored = folder / f"{args.examples}.scores"
    if scored.exists() and not args.again:
        return torch.load(scored, weights_only=False)
    run: dict[str, Any] = {"chosen": {}}
    for trained, tested in ((exclusive(language), (exclusive(language), mixing(language))),) + (
        (overlapping(language), (overlapping(language),)),
    ):
        path = folder / f"{trained.name}.safetensors"
        if not path.exists():
            train_pool(kind, language, trained, backbone, args, seed).save(path)
        if args.train_only:
            continue
        pool = TrainedPool.load(path, tuple(task.name for task in trained.experts))
        model = composed_pool(backbone, pool)
        validation = test_tasks(kind, language, trained.experts, 64, 2 * 10**8 + 1000 * seed)
        found, settings = all_systems(model, pool, own_text(kind, language, trained, seed), validation, "nats", seed)
        for suite in tested:
            tasks = test_tasks(kind, language, suite.tests, args.examples, 3 * 10**8 + 1000 * seed)
            run[suite.name] = evaluate(model, tasks, found, seed=seed).with_best_experts(pool.names).scores
            run["chosen"][suite.name] = settings
            print(f"{kind} seed {seed} {suite.name}: evaluated {len(found)} systems", flush=True)
        model.remove()
    if not args.train_only:
        torch.save(run, scored)
    return run


def main() -> None:
    """Train what the cache lacks, evaluate, print tables, write JSON."""
    args, started = arguments(), time.process_time()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"results": {}}
    for kind in args.kinds:
        runs = {seed: run_seed(kind, args, seed) for seed in args.seeds}
        if args.train_only:
            continue
        for suite in ("exclusive", "mixing", "overlapping"):
            table = Table([score for run in runs.values() for score in run[suite]])
            chosen = {seed: run["chosen"][suite] for seed, run in runs.items()}
            result["results"][f"{kind}/{suite}"] = summary(table, chosen, "tokens")
            print(f"\n### {suite}, {KINDS[kind]}\n\n{result['results'][f'{kind}/{suite}']['markdown']}\n", flush=True)
        write(args, result, started)


def write(args: argparse.Namespace, result: dict[str, Any], started: float) -> None:
    """What is measured so far, with where and how."""
    result |= {"settings": {k: str(v) for k, v in vars(args).items()}, **surroundings(started)}
    write_json(args.out, result)


if __name__ == "__main__":
    main()
