"""What sparse interpolated experts cost: a meta-tuning step against P>M>F's, and choosing weights for a support set.

    python -m benchmarks.meta_tuning_speed [--pixels 112] [--shots 5] [--queries 8] [--rounds 3] [--quick]
    python -m benchmarks.meta_tuning_speed --only route [--pixels 224]   # routing, merging, switching alone
    python -m benchmarks.meta_tuning_speed --report

A ViT-S/16 (384 x 12, random weights), M = 8, one thread, processor time; all contenders alternate on the same episode,
and P>M>F runs before each. P>M>F is a loop of its own: one pass over support and queries, its backward pass, SGD with
momentum over the backbone's own weights. A step is `accumulate` (4) episodes, forward and
backward, which the pool merges weights for at once, and one update (clipping and SGD over masks, shared change,
multipliers, AdamW over the router); the two are measured apart, medians put together.
`network` is what passes of the backbone alone would say, counting a forward pass of an item as 1 and a backward pass
as 2: what is above it are merging, its gradient and the constraint, which do not grow with the images.

Bars (at M = 8): 1.6 x P>M>F with both distillation terms, 1.25 x without; routing and merging for 25 images 0.5 x one
forward pass of them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.record import write_json
from benchmarks.timing import RESULTS, machine

EPISODES, EXPERTS, WAYS = 4, 8, 5
PLAIN = "P>M>F"
KEPT = {"frozen_cache": 10_000}
CONTENDERS: Mapping[str, Mapping[str, Any]] = {
    "paper: both terms, inner step": {},
    "both terms, frozen features kept": {"inner_rate": 0.0, **KEPT},
    "both terms of a quarter of the queries, inner step, frozen features kept": {"distilled": 0.25, **KEPT},
    "both terms of a quarter of the queries": {"inner_rate": 0.0, "distilled": 0.25},
    "no distillation, inner step": {"distillation": 0.0},
    "no distillation": {"distillation": 0.0, "inner_rate": 0.0},
    "no distillation, frozen features kept": {"distillation": 0.0, "inner_rate": 0.0, **KEPT},
}
BARS = {name: 1.25 if settings.get("distillation") == 0.0 else 1.6 for name, settings in CONTENDERS.items()}
ROUTE_BAR = 0.5


def vit_small(pixels: int, quick: bool) -> nn.Module:
    from mixwright.backbones.hf import build_backbone

    width, layers = (64, 2) if quick else (384, 12)
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shape = {"num_attention_heads": width // 64, "image_size": pixels, "patch_size": 16, "num_channels": 3}
    return build_backbone("vit", {**size, **shape}, kind="encoder", seed=0)


def pool(backbone: nn.Module) -> Any:
    """A pool in the middle of training: its change is not zero, its masks are not yet as sparse as they should be."""
    import mixwright as mw

    model = mw.compose("smat", backbone=backbone, experts=EXPERTS, exclude=("pooler*",))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for delta in model.deltas.delta.values():
            delta.copy_(1e-3 * torch.randn(delta.shape, generator=draw))
        model.deltas.multipliers.fill_(0.1)
    return model.train()


def episode(pixels: int, shots: int, queries: int) -> Any:
    from mixwright.data.episodes import Episode

    draw = torch.Generator().manual_seed(1)
    support, query = (torch.randn(WAYS * n, 3, pixels, pixels, generator=draw) for n in (shots, queries))
    return Episode(support, torch.arange(len(support)) % WAYS, query, torch.arange(len(query)) % WAYS)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def plain_step(backbone: nn.Module, given: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """The episodes of an update of P>M>F, one after another, forward and backward, and its update."""
    from mixwright.ops.prototypes import class_means, cosine_scores

    parameters = [p for name, p in backbone.named_parameters() if not name.startswith("pooler")]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    items, shots = torch.cat([given.support, given.query]), len(given.labels)

    def learn() -> None:
        for _ in range(EPISODES):
            once()

    def once() -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
        features = backbone(items).last_hidden_state[:, 0]
        prototypes = class_means(features[:shots], given.labels, WAYS)
        cross_entropy(cosine_scores(features[shots:], prototypes), given.query_labels).backward()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return learn, update


def pool_step(model: Any, given: Any) -> tuple[dict[str, Callable[[], object]], Callable[[], object]]:
    """The episodes of an update of each contender, and the update that they share."""
    from mixwright.methods.smat.config import SmatConfig
    from mixwright.methods.smat.episode_loss import EpisodeLoss
    from mixwright.methods.smat.recipe import groups, stages
    from mixwright.ops.rows import join
    from mixwright.training.gradients import clip_gradients
    from mixwright.training.optimizers import make_optimizers
    from mixwright.training.stage import select_parameters

    stage = replace(stages(SmatConfig(experts=EXPERTS))[0], groups=groups(SmatConfig(experts=EXPERTS), model))
    chosen = select_parameters(model, stage.groups)
    learning = [parameter for group in chosen for parameter in group.values()]
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizers = make_optimizers(model, stage, chosen)

    def update() -> None:
        for group, members in zip(stage.groups, chosen, strict=True):
            clip_gradients(members.values(), float("inf") if group.clip is False else float(group.clip))
        for optimizer in optimizers:
            optimizer.step()  # at rate 0
        model.deltas.after_step()
        for parameter in learning:
            assert parameter.grad is not None
            parameter.grad.zero_()

    def contender(settings: Mapping[str, Any]) -> Callable[[], object]:
        loss = EpisodeLoss(SmatConfig(experts=EXPERTS, **settings))
        if loss.config.frozen_cache:
            loss.frozen(model, join(given.support, given.query))
        return lambda: loss.together(model, [given] * EPISODES).backward()

    return {name: contender(settings) for name, settings in CONTENDERS.items()}, update


def network(settings: Mapping[str, Any], shots: int, queries: int) -> float:
    """Passes of the backbone against P>M>F's, a forward pass as 1, a backward pass as 2."""
    distils, teacher = settings.get("distillation", 1) > 0, settings.get("from_teacher", True)
    part = max(1, round(settings.get("distilled", 1.0) * queries)) if distils else 0
    frozen = 0 if "frozen_cache" in settings else shots + part
    inner = 0 if settings.get("inner_rate") == 0 else 2 * shots
    again = part * (1 + 2) if distils and teacher else 0
    return (frozen + 3 * (shots + queries) + inner + again) / (3 * (shots + queries))


def steps(given: argparse.Namespace, backbone: nn.Module) -> Iterator[dict[str, Any]]:
    """The steps, with every round's numbers in it."""
    task = episode(given.pixels, given.shots, given.queries)
    learn, plain_update = plain_step(backbone, task)
    runs, update = pool_step(pool(backbone), task)
    plain_step(backbone, episode(given.pixels, 1, 1))[0]()  # a small warm-up
    found: dict[str, list[float]] = {name: [] for name in runs}
    beside: dict[str, list[float]] = {name: [] for name in runs}
    updates: dict[str, list[float]] = {PLAIN: [], "pool": []}
    for number in range(given.rounds):
        for name in [*runs][number % len(runs) :] + [*runs][: number % len(runs)]:
            beside[name].append(seconds(learn))
            found[name].append(seconds(runs[name]))
            print(name, found[name][-1], PLAIN, beside[name][-1], flush=True)
        updates[PLAIN].append(seconds(plain_update))
        updates["pool"].append(seconds(update))
        yield _summed(given, found, beside, updates)


def _summed(given: argparse.Namespace, found: Any, beside: Any, updates: Any) -> dict[str, Any]:
    found = {PLAIN: [each for values in beside.values() for each in values], **found}
    turns = {kind: statistics.median(values) for kind, values in updates.items()}
    once = {name: statistics.median(values) for name, values in found.items()}
    whole = {n: s + turns[PLAIN if n == PLAIN else "pool"] for n, s in once.items()}
    shots, queries = WAYS * given.shots, WAYS * given.queries
    rows = {
        name: {
            "episodes_s": once[name], "all_s": found[name], "step_s": whole[name], "ratio": whole[name] / whole[PLAIN],
            "network": 1.0 if name == PLAIN else network(CONTENDERS[name], shots, queries), "bar": BARS.get(name),
        }
        for name in found
    }  # fmt: skip
    shape = {"pixels": given.pixels, "support": shots, "queries": queries, "episodes": EPISODES, "experts": EXPERTS}
    return {"shape": shape, "update_s": turns, "rows": rows}


def route(given: argparse.Namespace, backbone: nn.Module) -> Iterator[dict[str, Any]]:
    """Routing and merging for 25 images against a forward pass of them, and switching between known adaptations."""
    model = pool(backbone).eval()
    support = episode(given.pixels, 5, 1).support_set
    features = model.frozen_features(support.inputs)
    routing = model.routing(support, features)
    kept = {name: tensor.detach() for name, tensor in model.weights_for(routing).items()}

    @torch.no_grad()
    def merged(known: torch.Tensor | None) -> object:
        return model.weights_for(model.routing(support, known))

    def switched() -> None:
        with model.adapted(routing):
            pass

    def put() -> None:
        model._rollback.apply(kept)  # the weights themselves are kept, not the mixture
        model._rollback.undo()

    runs: dict[str, Callable[[], object]] = {
        "one forward pass of the support": lambda: model.frozen_features(support.inputs),
        "route and merge, frozen features known": lambda: merged(features),
        "route and merge, with the frozen pass": lambda: merged(None),
        "adapt in place to a known mixture, and back": switched,
        "put kept weights in place, and back": put,
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(given.rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if number:
                found[name].append(taken)
    middle = {name: statistics.median(values) for name, values in found.items()}
    base = middle["one forward pass of the support"]
    rows = {n: {"s": s, "all_s": found[n], "ratio": s / base} for n, s in middle.items()}
    ratio = rows["route and merge, frozen features known"]["ratio"]
    yield {
        "shape": {"pixels": given.pixels, "support": 25},
        "rows": rows,
        "bar": ROUTE_BAR,
        "holds": ratio <= ROUTE_BAR,
    }


def report(result: Mapping[str, Any]) -> str:
    """The tables of the method's README."""
    lines: list[str] = []
    if "steps" in result:
        found = result["steps"]
        shape = found["shape"]
        lines += [
            f"{shape['support']} support and {shape['queries']} query images of {shape['pixels']} px; "
            f"{shape['episodes']} episodes a step; processor seconds, one thread.\n",
            "| step | s | x P>M>F | passes of the network alone | bar |",
            "|---|---|---|---|---|",
        ]
        for name, row in found["rows"].items():
            held = "" if row["bar"] is None else f"{row['bar']}: {'holds' if row['ratio'] <= row['bar'] else 'missed'}"
            lines.append(f"| {name} | {row['step_s']:.1f} | {row['ratio']:.2f} | {row['network']:.2f} | {held} |")
    if "route" in result:
        found = result["route"]
        lines += [f"\n25 images of {found['shape']['pixels']} px:\n", "| | s | x a forward pass |", "|---|---|---|"]
        lines += [f"| {name} | {row['s']:.3f} | {row['ratio']:.2f} |" for name, row in found["rows"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--shots", type=int, default=5, help="of each of the five classes")
    parser.add_argument("--queries", type=int, default=8, help="of each class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["steps", "route"])
    parser.add_argument("--quick", action="store_true", help="a small model, nothing is written")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    path = RESULTS / "meta_tuning_speed.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    if not given.report:
        started = time.process_time()
        torch.set_num_threads(1)
        backbone = vit_small(given.pixels, given.quick)
        for name, part in (("steps", steps), ("route", route)):
            if given.only in (None, name):
                for found in part(given, backbone):
                    result = json.loads(path.read_text()) if path.exists() else {}
                    result[name] = {**found, "machine": machine(started)}
                    if not given.quick:
                        write_json(path, result)
    print(report(result))


if __name__ == "__main__":
    main()
