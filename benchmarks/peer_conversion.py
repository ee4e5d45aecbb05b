"""Trained feed-forward layers as single-neuron experts: held-out loss against the neurons that act on a token.

    python -m benchmarks.peer_conversion
    python -m benchmarks.peer_conversion --report

Two byte-level models are trained on WikiText-2's small files, one with ReLU (GPT-NeoX, 512 neurons in each of 4 layers)
and one with SwiGLU (Llama, 384), and kept under --cache. Then all their feed-forward layers are converted, and of each
layer k neurons act: those of an oracle (largest |act| |v|), of keys fitted to the oracle on calibration text, of these
after fine-tuning, the same for every token, or random ones.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_models import (
    CONTEXT,
    RELU,
    SWIGLU,
    batches,
    dense,
    feed_forward_paths,
    held_out,
    loss_of,
    wikitext,
    windows,
)
from benchmarks.record import surroundings, write_json
from mixwright.evaluation.table import markdown
from mixwright.methods.peer.conversion import Conversion
from mixwright.methods.peer.neurons import Neurons, read_neurons

SQUARE, FLAT = "fitted, near-square grid", "fitted, grid (1, f)"
TUNED = {SQUARE: "fitted and fine-tuned, near-square grid", FLAT: "fitted and fine-tuned, grid (1, f)"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/peer"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peer_conversion.json"))
    parser.add_argument("--kinds", nargs="+", choices=(RELU, SWIGLU), default=[RELU, SWIGLU])
    parser.add_argument("--active", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tuned", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=700, help="of the models' own training")
    parser.add_argument("--fit-steps", type=int, default=120)
    parser.add_argument("--tune-steps", type=int, default=50)
    parser.add_argument("--windows", type=int, default=64, help="held out, of 128 bytes each")
    parser.add_argument("--keep-active", type=int, default=32, help="retrieved while the dense branch shrinks")
    parser.add_argument("--report", action="store_true", help="print the tables of the JSON")
    return parser.parse_args()


Choice = Callable[[Neurons, Tensor, Tensor], Tensor]


@contextmanager
def only(model: nn.Module, choice: Choice) -> Iterator[None]:
    """Inside the block only the neurons that `choice` marks act, in every feed-forward layer."""

    def hook(neurons: Neurons) -> Any:
        def act(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden, importance = neurons.hidden(args[0]), neurons.importance(args[0])
            out = (hidden * choice(neurons, importance, args[0])) @ neurons.rows[:, -1]
            return out if neurons.out_bias is None else out + neurons.out_bias

        return act

    layers = [model.get_submodule(path) for path in feed_forward_paths(model)]
    hooks = [layer.register_forward_hook(hook(read_neurons(layer))) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def oracle(k: int) -> Choice:
    """The k with the largest |act| |v|."""
    return lambda _, importance, x: marks(importance, importance.topk(k, -1).indices)


def random(k: int) -> Choice:
    """Any k."""
    draw = torch.Generator().manual_seed(0)
    return lambda _, importance, x: marks(importance, torch.rand(importance.shape, generator=draw).topk(k, -1).indices)


def marks(like: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter(-1, ids, 1.0)


def calibration(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    draw = batches(wikitext(args.data)[0], 16, 99)
    return [{"input_ids": next(draw)[:, :-1]} for _ in range(8)]


def pruned(model: nn.Module, k: int, steps: Conversion) -> Choice:
    """The neurons that calibration text finds most useful, the same on every token."""
    by_rows = {float(layer.neurons.rows[layer.cells[0]].sum()): layer for layer in steps.layers.values()}

    def choose(neurons: Neurons, importance: Tensor, x: Tensor) -> Tensor:
        layer = by_rows[float(neurons.rows[0].sum())]
        useful = layer.usefulness[layer.cells].topk(k).indices
        return marks(importance, useful.expand(*importance.shape[:-1], k))

    return choose


def tune(model: nn.Module, args: argparse.Namespace, learned: list[nn.Parameter], rate: float = 1e-3) -> None:
    """A few steps of language modelling on the training text, in batches of 8 windows."""
    draw = batches(wikitext(args.data)[0], 8, 5)
    optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    for parameter in learned:
        parameter.requires_grad_(True)
    for step in range(args.tune_steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * max(0.02, 1 - step / args.tune_steps)
        loss_of(model, next(draw)).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        optimiser.zero_grad()


def macs(steps: Conversion) -> float:
    """Multiply-adds of retrieval for a token and layer, over those of the dense layer."""
    layer = next(iter(steps.layers.values()))
    router, rows = layer.router, layer.neurons.rows
    queries, keys = router.queries.weight.numel(), sum(router.grid) * router.dim_key // 2
    return (queries + keys) / (len(layer.cells) * rows.shape[1] * rows.shape[2])


def measure_kind(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    model = dense(kind, args.data, args.cache, args.steps)
    test = windows(wikitext(args.data)[2], args.windows)
    texts = calibration(args)
    whole = held_out(model, test)
    first = next(model.get_submodule(path) for path in feed_forward_paths(model))
    neurons = read_neurons(first)
    found: dict[str, Any] = {"neurons": len(neurons), "layers": len(feed_forward_paths(model)), "dense": whole}
    curves: dict[str, dict[int, float]] = {
        name: {} for name in ("oracle", SQUARE, FLAT, *TUNED.values(), "same", "random")
    }
    retrieval: dict[str, dict[int, Any]] = {SQUARE: {}, FLAT: {}}
    exact = Conversion(model).take_over()
    found["all_neurons"] = held_out(exact, test)
    found["all_neurons_logits_differ_by"] = logits_gap(exact, test[0])
    exact.remove()
    for k in args.active:
        for name, grid in ((SQUARE, None), (FLAT, (1, len(neurons)))):
            steps = Conversion(model, texts, top_k=k, grid=grid)
            neutral = held_out(steps.model, test[:1]) == held_out(model_of(steps), test[:1])
            recalls = steps.fit_keys(args.fit_steps)
            curves[name][k] = held_out(steps.take_over(), test)
            retrieval[name][k] = {
                "recall": mean([r.recall for r in recalls.values()]),
                "error": mean([r.error for r in recalls.values()]),
                "oracle_error": mean([r.oracle_error for r in recalls.values()]),
                "retrieval_macs": macs(steps),
                "neutral_beside": neutral,
            }
            steps.model.remove()
            print(f"{kind} k {k} {name}: {curves[name][k]:.4f} {retrieval[name][k]}", flush=True)
        with torch.no_grad():
            for name, choice in (("oracle", oracle(k)), ("random", random(k)), ("same", pruned(model, k, steps))):
                with only(model, choice):
                    curves[name][k] = held_out(model, test)
    found |= {"loss": curves, "retrieval": retrieval, "rows_in": by_rows(model, args, texts, test)}
    found["kept"] = shrinking(model, args, texts, test)
    for k in args.tuned:
        for name, grid in ((SQUARE, None), (FLAT, (1, len(neurons)))):
            steps = Conversion(model, texts, top_k=k, grid=grid, gate="sigmoid")
            steps.fit_keys(args.fit_steps)
            composed = steps.take_over().train()
            tune(composed, args, [p for layer in composed.mixtures.values() for p in trainable(layer)])
            curves[TUNED[name]][k] = held_out(composed, test)
            composed.remove()
            print(f"{kind} k {k} {TUNED[name]}: {curves[TUNED[name]][k]:.4f}", flush=True)
    tune(model, args, [p for path in feed_forward_paths(model) for p in model.get_submodule(path).parameters()])
    found["dense_fine_tuned"] = held_out(model, test)
    return found


def model_of(steps: Conversion) -> nn.Module:
    """The backbone as it is without experts."""

    class Bare(nn.Module):
        def forward(self, **inputs: Any) -> Any:
            with steps.model.disabled():
                return steps.model(**inputs)

    return Bare()


def trainable(mixture: Any) -> list[nn.Parameter]:
    return [*mixture.router.parameters(), *mixture.experts.parameters()]


@torch.no_grad()
def logits_gap(composed: Any, batch: Tensor) -> float:
    """The largest difference of a logit, over the largest logit."""
    ours = composed(input_ids=batch[:, :-1]).logits
    with composed.disabled():
        theirs = composed(input_ids=batch[:, :-1]).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


def by_rows(model: nn.Module, args: argparse.Namespace, texts: Any, test: list[Tensor]) -> dict[str, float]:
    """The near-square grid at one k with neurons clustered by their rows in, not by the tokens on which they matter."""
    steps = Conversion(model, texts, top_k=args.active[len(args.active) // 2], cluster="rows")
    recalls = steps.fit_keys(args.fit_steps)
    found: dict[str, float] = {"k": args.active[len(args.active) // 2], "loss": held_out(steps.take_over(), test)}
    steps.model.remove()
    return found | {"recall": mean([r.recall for r in recalls.values()])}


def shrinking(model: nn.Module, args: argparse.Namespace, texts: Any, test: list[Tensor]) -> list[dict[str, float]]:
    """The dense branch shrinks: fewer and fewer neurons always act, beside those that are retrieved."""
    steps = Conversion(model, texts, top_k=args.keep_active)
    steps.take_over()
    tried = steps.shrink(lambda now: held_out(now, test), budget=1.0, steps=args.fit_steps // 2)
    steps.model.remove()
    print("kept", tried, flush=True)
    return [{"keep": step.keep, "loss": step.loss} for step in tried]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(result: dict[str, Any]) -> str:
    parts: list[str] = []
    for kind, found in result["results"].items():
        active = [str(k) for k in result["active"]]
        parts.append(
            f"**{kind}**, {found['layers']} layers of {found['neurons']} neurons; nats per byte. Dense "
            f"{found['dense']:.3f}; all neurons retrieved {found['all_neurons']:.3f} (logits differ by "
            f"{found['all_neurons_logits_differ_by'] or 1e-5:.0e} of the largest, or less); dense, fine-tuned as long "
            f"{found['dense_fine_tuned']:.3f}.\n"
        )
        rows = [
            [name, *(f"{curve[k]:.3f}" if k in curve else "" for k in active)] for name, curve in found["loss"].items()
        ]
        for name, at in found["retrieval"].items():
            cells = [f"{at[k]['recall']:.2f}" for k in active]
            rows.append([f"recall of the oracle's neurons, {name.removeprefix('fitted, ')}", *cells])
        parts.append(markdown(["neurons that act, of each layer", *active], rows) + "\n")
        costs = {name: next(iter(at.values()))["retrieval_macs"] for name, at in found["retrieval"].items()}
        parts.append(
            "Retrieval costs "
            + ", ".join(f"{cost:.0%} of the dense layer's multiply-adds ({name})" for name, cost in costs.items())
            + f". On the near-square grid, neurons clustered by their rows in: loss {found['rows_in']['loss']:.3f}, "
            f"recall {found['rows_in']['recall']:.2f} at k {found['rows_in']['k']}.\n"
        )
        kept = found["kept"]
        shown = [["loss", *(f"{step['loss']:.3f}" for step in kept)]]
        parts.append(
            markdown([f"always act, beside {result['keep_active']} retrieved", *(str(s["keep"]) for s in kept)], shown)
            + "\n"
        )
    return "\n".join(parts)


def main() -> None:
    args, started = arguments(), time.process_time()
    if args.report:
        print(report(json.loads(args.out.read_text())))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {"active": args.active, "keep_active": args.keep_active, "context": CONTEXT, "results": {}}
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "cache", "out", "report")}
    for kind in args.kinds:
        result["results"][kind] = measure_kind(kind, args)
        result |= {"settings": settings, **surroundings(started)}
        write_json(args.out, result)
    print(report(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
