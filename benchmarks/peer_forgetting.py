"""A model with a PEER layer learns a second domain: what it costs on the first.

    python -m benchmarks.peer_forgetting
    python -m benchmarks.peer_forgetting --report

A byte-level Llama of three layers, the middle one's feed-forward a PEER layer of 32 x 32 experts, is trained on
WikiText-2's small files (A) and kept under --cache. Then it is adapted to tinyshakespeare (B): by growth (8 x 32
experts more in slots of their own, or let in among the others; all that was there is frozen), by LoRA of as many
trainable parameters, and by tuning everything. Each has its learning rate chosen on B's validation text, with the
first seed.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mixwright as mw
from benchmarks.peer_models import SWIGLU, batches, build, held_out, kept, loss_of, plays, train, wikitext, windows
from benchmarks.record import surroundings, write_json
from mixwright.evaluation.table import markdown
from mixwright.methods.peer.growth import admit, freeze_present, grow, reserve_slots

WIDTH, CONTEXT, ROWS = 96, 64, 16
SLOTS, ADMITTED, LORA, FULL = "growth, slots of their own", "growth, admitted", "LoRA", "full tuning"
RATES = {SLOTS: (3e-3, 1e-2, 3e-2), ADMITTED: (3e-3, 1e-2, 3e-2), LORA: (1e-3, 3e-3, 1e-2), FULL: (3e-4, 1e-3, 3e-3)}
NEW = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/peer"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peer_forgetting.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="on the first domain")
    parser.add_argument("--adapt-steps", type=int, default=160, help="on the second")
    parser.add_argument("--windows", type=int, default=256, help="held out of each domain, of 64 bytes each")
    parser.add_argument("--report", action="store_true", help="print the table of the JSON")
    return parser.parse_args()


class LowRank(nn.Module):
    """W + B A, with B zero at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def fresh(seed: int) -> nn.Module:
    model = build(SWIGLU, seed, layers=3, width=WIDTH)
    torch.manual_seed(seed)
    model.model.layers[1].mlp = mw.PEER(WIDTH, (32, 32), heads=4, top_k=8, dim_key=32, query_norm="layer")
    return model


def trained(args: argparse.Namespace, seed: int) -> nn.Module:
    model = fresh(seed)
    draw = batches(wikitext(args.data)[0], ROWS, seed + 1, CONTEXT)
    return kept(
        args.cache / f"forgetting-{args.steps}-{seed}.safetensors", model, lambda: train(model, draw, args.steps)
    )


def layer_of(model: nn.Module) -> Any:
    return model.model.layers[1].mlp


def learns_by_growth(model: nn.Module, slots: bool) -> list[nn.Parameter]:
    layer = layer_of(model)
    model.requires_grad_(False)
    layer.requires_grad_(True)
    grow(layer.router, layer.experts, NEW, source="plays", zero_out=not slots)
    if slots:
        reserve_slots(layer.router, layer.experts, layer.router.top_k)
    freeze_present(layer.router, layer.experts)
    return [p for p in layer.parameters() if p.requires_grad]


def learns_by_lora(model: nn.Module, size: int) -> list[nn.Parameter]:
    """All linear layers outside of the PEER layer and the head, at the rank that comes closest to `size` numbers."""
    model.requires_grad_(False)
    inside = layer_of(model)
    skip = {id(module) for module in inside.modules()}
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear) and id(m) not in skip]
    each = sum(sum(layer.weight.shape) for layer in layers)
    rank = max(1, round(size / each))
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return [p for p in model.parameters() if p.requires_grad]


def growth_size() -> int:
    return NEW * 32 * 2 * WIDTH + NEW * 16 + 4


def adapt(method: str, rate: float, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The losses on both domains along the way and at the end."""
    model = trained(args, seed)
    torch.manual_seed(seed)
    layer = layer_of(model)
    old = {name: p.detach().clone() for name, p in layer.named_parameters()}
    if method in (SLOTS, ADMITTED):
        learned = learns_by_growth(model, method == SLOTS)
    elif method == LORA:
        learned = learns_by_lora(model, growth_size())
    else:
        learned = list(model.requires_grad_(True).parameters())
    optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    draw = batches(plays(args.data)[0], ROWS, seed + 11, CONTEXT)
    first, second, choose = domains(args)
    small = [part[:2] for part in (first, second)]
    path = [[0, *(held_out(model, part) for part in small)]]
    model.train()
    for step in range(args.adapt_steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10) * max(0.02, 1 - step / args.adapt_steps)
        if method == ADMITTED and layer.experts.grown is not None:
            admit(layer.router, layer.experts, min(1.0, (step + 1) / (args.adapt_steps // 4)))
        loss_of(model, next(draw)).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 20 == 0:
            path.append([step + 1, *(held_out(model, part) for part in small)])
    found = {"rate": rate, "validation": held_out(model, choose), "path": path}
    found |= {"first": held_out(model, first), "second": held_out(model, second), "seed": seed}
    found["trainable"] = growth_size() if method in (SLOTS, ADMITTED) else sum(p.numel() for p in learned)
    if method in (SLOTS, ADMITTED):
        found["old_rows_the_same"] = unchanged(layer, old)
        put_out(layer)
        found["first_without_the_new"] = held_out(model, first)
    print(f"seed {seed} {method} at {rate}: { ({k: v for k, v in found.items() if k != 'path'}) }", flush=True)
    return found


def unchanged(layer: Any, old: dict[str, Tensor]) -> bool:
    now = dict(layer.named_parameters())
    return all(
        torch.equal(now[name].narrow(axis, 0, tensor.shape[axis]), tensor)
        for name, tensor in old.items()
        for axis in [1 if name.endswith("keys_first") else 0]
    )


def put_out(layer: Any) -> None:
    """The new experts are kept out again."""
    router = layer.router
    if router.extra is None:
        router.bias_first = router.bias_first.clone()
        router.bias_first[:, 32:] = -torch.inf
    else:
        router.extra_gate.data.zero_()


def domains(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Held-out text of the first domain and of the second, and text of the second to choose on."""
    (_, _, first), (_, choose, second) = wikitext(args.data), plays(args.data)
    cut = partial(windows, context=CONTEXT, rows=64)
    return cut(first, args.windows), cut(second, args.windows), cut(choose, args.windows // 2)


def report(result: dict[str, Any]) -> str:
    before = result["before"]
    names = ["first", "second"]
    rows = [["before", "", *(f"{mean([one[n] for one in before]):.3f}" for n in names), "", "", ""]]
    for method, runs in result["methods"].items():
        rows.append(
            [
                method,
                f"{runs[0]['trainable']:,}",
                *(spread([run[name] for run in runs]) for name in names),
                f"{mean([run['first'] - one['first'] for run, one in zip(runs, before)]):+.3f}",
                at_equal(method, result),
                f"{runs[0]['rate']:g}",
            ]
        )
    head = ["method", "trainable", "A", "B", "A, change", "A where B is as growth's", "learning rate"]
    without = [run["first_without_the_new"] for run in result["methods"][SLOTS]]
    same = all(run["old_rows_the_same"] for method in (SLOTS, ADMITTED) for run in result["methods"][method])
    return markdown(head, rows) + (
        f"\n\nWith the new experts kept out again A is {mean(without):.3f}; old rows and keys "
        f"{'stayed the same to the bit' if same else 'CHANGED'}.\n"
    )


def at_equal(method: str, result: dict[str, Any]) -> str:
    """A's loss along the way, interpolated where B's is what growth with slots ended at; on a part of the text."""
    found: list[float] = []
    for run, growth in zip(result["methods"][method], result["methods"][SLOTS], strict=True):
        wanted = growth["path"][-1][2]
        for (_, a0, b0), (_, a1, b1) in zip(run["path"], run["path"][1:], strict=False):
            if b0 >= wanted >= b1:
                found.append(a0 + (a1 - a0) * (b0 - wanted) / max(b0 - b1, 1e-9))
                break
    return f"{mean(found):.3f}" if len(found) == len(result["methods"][method]) else "not reached"


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    args, started = arguments(), time.process_time()
    if args.report:
        print(report(json.loads(args.out.read_text())))
        return
    torch.set_num_threads(1)
    result: dict[str, Any] = {"before": [], "methods": {}, "tried": {}}
    for seed in args.seeds:
        model = trained(args, seed)
        first, second, _ = domains(args)
        result["before"].append({"first": held_out(model, first), "second": held_out(model, second)})
    for method, rates in RATES.items():
        tried = [adapt(method, rate, args, args.seeds[0]) for rate in rates]
        best = min(tried, key=lambda run: run["validation"])
        others = [adapt(method, best["rate"], args, seed) for seed in args.seeds[1:]]
        result["methods"][method] = [best, *others]
        result["tried"][method] = {str(run["rate"]): run["validation"] for run in tried}
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "cache", "out", "report")}
    result |= {"settings": settings, **surroundings(started)}
    write_json(args.out, result)
    print(report(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
