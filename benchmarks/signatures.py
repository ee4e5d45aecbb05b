"""What should a signature hold? Picking the own task of a token, site by site, from diagonal or low-rank statistics.

    python -m benchmarks.signatures --data ../shared/data/text_suite

Signatures of the nine held-in tasks are collected on all-MiniLM-L6-v2 from training texts, with a long factor, and cut
to every rank; the discriminants that they make are judged on test texts: how often is the best score the own task's
(for each token, and for the mean over a text's tokens), and how far are the softmax probabilities from earned (negative
log likelihood, chance 2.20). No expert acts. Also: texts of no task against texts of the pool by `out_of_pool`.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.text_suite import adapted_sites, load_backbone
from benchmarks.text_tasks import HELD_IN, Tokenise
from mixwright.composition.signatures import collect_signatures
from mixwright.routers.base import AbstractScores
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.signature import SignatureScores, out_of_pool, redundancy

Signatures = dict[str, list[dict[str, Tensor]]]
TEMPERATURES = (1.0, 2.0, 3.0, 5.0, 10.0)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text_suite"))
    parser.add_argument("--foreign", type=Path, default=Path("../shared/data/wikitext2/test.txt"))
    parser.add_argument("--model", type=Path, help="folder of all-MiniLM-L6-v2; default: the installed package's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/signatures.json"))
    parser.add_argument("--train-texts", type=int, default=100, help="for each task's signature")
    parser.add_argument("--test-texts", type=int, default=25, help="for each task")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 8, 16, 32])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def texts_of(path: Path, count: int, seed: int) -> list[str]:
    """A random sample of the texts in a JSONL file, or of the lines of a plain one."""
    lines = path.read_text().splitlines()
    texts = [json.loads(line)["text"] if path.suffix == ".jsonl" else line for line in lines if len(line) > 40]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order[:count].tolist()]


def batches(texts: list[str], tokenise: Tokenise) -> list[dict[str, Tensor]]:
    """Texts of like length together, 25 at a time."""
    ordered = sorted(texts, key=len)
    return [tokenise(ordered[i : i + 25]) for i in range(0, len(ordered), 25)]


def cut(signatures: Signatures, rank: int) -> Signatures:
    """The same with a shorter factor: its rows are ordered by strength."""
    return {
        site: [{name: value[:rank] if name == "factor" else value for name, value in one.items()} for one in each]
        for site, each in signatures.items()
    }


def activations(backbone: nn.Module, batch: dict[str, Tensor], sites: list[str]) -> dict[str, Tensor]:
    """Site -> its input, (batch, seq, d_in)."""
    found: dict[str, Tensor] = {}
    hooks = [
        backbone.get_submodule(site).register_forward_pre_hook(lambda _, x, site=site: found.update({site: x[0]}))
        for site in sites
    ]
    with torch.no_grad():
        backbone(**batch)
    for hook in hooks:
        hook.remove()
    return found


class Judge:
    """Counts hits and likelihoods of one way of scoring, over sites and tasks."""

    def __init__(self, scores: dict[str, AbstractScores]) -> None:
        self.scores = scores
        self.sums: dict[str, float] = defaultdict(float)

    def see(self, site: str, x: Tensor, real: Tensor, task: int) -> None:
        """One batch of one task at one site."""
        scores = self.scores[site](x)
        kept = scores[real]
        texts = (scores * real.unsqueeze(-1)).sum(1)
        self.sums["tokens"] += len(kept)
        self.sums["texts"] += len(texts)
        self.sums["token_hits"] += float((kept.argmax(-1) == task).sum())
        self.sums["text_hits"] += float((texts.argmax(-1) == task).sum())
        self.sums["spread"] += float((kept - kept.mean(-1, keepdim=True)).square().mean(-1).sqrt().sum())
        self.sums["top"] += float(torch.softmax(kept, -1).amax(-1).sum())
        for temperature in TEMPERATURES:
            surprise = -torch.log_softmax(kept / temperature, -1)[:, task].sum()
            self.sums[f"nll_T{temperature:g}"] += float(surprise)

    def result(self) -> dict[str, float]:
        """Means over tokens, or texts."""
        tokens, texts = self.sums["tokens"], self.sums["texts"]
        out = {"token_accuracy": self.sums["token_hits"] / tokens, "text_accuracy": self.sums["text_hits"] / texts}
        out |= {"logit_spread": self.sums["spread"] / tokens, "top_probability": self.sums["top"] / tokens}
        return out | {name: total / tokens for name, total in self.sums.items() if name.startswith("nll")}


def auroc(inside: Tensor, outside: Tensor) -> float:
    """The probability that a text from outside lies further off than one from inside."""
    return float(
        (outside[:, None] > inside[None]).float().mean() + 0.5 * (outside[:, None] == inside[None]).float().mean()
    )


def main() -> None:
    """Collect, cut, judge, write the JSON."""
    args = arguments()
    if not args.data.is_dir():
        sys.exit(f"skipped: no folder {args.data}; give --data FOLDER with the text suite.")
    torch.set_num_threads(1)
    backbone, tokenise = load_backbone(args.model)
    sites = [
        path for path in adapted_sites(backbone) if not path.endswith((".key", ".value"))
    ]  # they read query's input
    whole: Signatures = {site: [] for site in sites}
    seconds: list[float] = []
    for task in HELD_IN:
        started = time.process_time()
        texts = texts_of(args.data / task / "train.jsonl", args.train_texts, args.seed)
        found = collect_signatures(backbone, batches(texts, tokenise), sites, rank=max(args.ranks))
        seconds.append(time.process_time() - started)
        for site in sites:
            whole[site].append(found[site])
        print(f"{task}: {int(found[sites[0]]['count'])} tokens, {seconds[-1]:.1f} CPU-s", flush=True)
    judges = {
        f"rank {rank}": Judge(
            {site: SignatureScores.from_signatures(own, temperature=1.0) for site, own in cut(whole, rank).items()}
        )
        for rank in args.ranks
    }
    means = {site: PrototypeScores(torch.stack([one["mean"] for one in own])) for site, own in whole.items()}
    judges["means alone, standardised (average activation)"] = Judge(means)
    inside, outside = distances(backbone, tokenise, whole, sites, judges, args)
    results: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path | None)},
        "collect_cpu_seconds_per_task": sum(seconds) / len(seconds),
        "scores": {name: judge.result() for name, judge in judges.items()},
        "out_of_pool": {
            "inside": float(inside.mean()),
            "outside": float(outside.mean()),
            "auroc": auroc(inside, outside),
        },
        "redundancy": dict(zip(HELD_IN, redundancy(whole[sites[-1]]).tolist(), strict=True)),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["scores"].items():
        print(f"{name:48s}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print("out of pool:", results["out_of_pool"])


def distances(
    backbone: nn.Module,
    tokenise: Tokenise,
    whole: Signatures,
    sites: list[str],
    judges: dict[str, Judge],
    args: argparse.Namespace,
) -> tuple[Tensor, Tensor]:
    """Let the judges see every test text, and return each text's `out_of_pool` at the middle site: pool's, foreign."""
    middle = sites[len(sites) // 2]
    inside: list[Tensor] = []
    outside: list[Tensor] = []
    sources = [args.data / task / "test.jsonl" for task in HELD_IN]
    for number, path in enumerate([*sources, *([args.foreign] if args.foreign.is_file() else [])]):
        for batch in batches(texts_of(path, args.test_texts, args.seed), tokenise):
            real = batch["attention_mask"].bool()
            found = activations(backbone, batch, sites)
            each = out_of_pool(found[middle], whole[middle]) * real
            (inside if number < len(HELD_IN) else outside).append(each.sum(-1) / real.sum(-1))
            for judge in judges.values() if number < len(HELD_IN) else ():
                for site in sites:
                    judge.see(site, found[site], real, number)
    return torch.cat(inside), torch.cat(outside or [torch.zeros(0)])


if __name__ == "__main__":
    main()
