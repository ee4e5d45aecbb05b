"""One adapted square layer (rank 16, 8 latent experts, float32) against its materialising form, LoRA and PEFT's Poly.

    python -m benchmarks.tensor_layer [--quick] [--cpu-time]
    python -m benchmarks.tensor_layer --report    # the table of the method's README, from the stored result

Everything alternates in one run. `adapter` is x -> A -> B alone, routing weights given: a training step (forward and
backward with all gradients, that of x too), a forward without gradients that builds the factors anew, and evaluation,
where ours are kept and the materialising form builds its own. `layer` is the whole layer with its base: a training
step of `Mixture` with its task router, and evaluation with the task's factors kept. The materialising form is the
same layer with every term's product written out, once for each choice. PEFT's Poly has as many skills as we have
latent experts. Tokens are counted in all; a batch of 8 tasks has at least one for each.

Bars: never slower than materialising; at order 4 with 1 to 32 tokens at least 3x faster; a training step with 1024
tokens at most 1.15x plain LoRA; in evaluation with a kept task LoRA's own speed; faster than PEFT's Poly at every size.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peft_layers import poly, with_adapters
from benchmarks.timing import RESULTS, alternate, machine, show, summary, write
from mixwright.composition.mixture import Mixture
from mixwright.experts.tensor import TensorExperts
from mixwright.ops.low_rank import low_rank
from mixwright.ops.tensor_product import build_reference, ceil_radices
from mixwright.routers.task import TaskLogits
from mixwright.routing import Condition, Routing

RANK, TERMS, TASKS = 16, 8, 8
OURS, WRITTEN_OUT, LORA, POLY = "mixwright", "materialising", "plain LoRA", "PEFT Poly"
PEFT_LORA, BARE = "PEFT LoRA", "bare layer"


class Materialising(TensorExperts):
    """The same experts, each term's product written out and then mixed, once for each distinct choice."""

    def factors(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        down, up = tuple(self.down), tuple(self.up)
        return build_reference(down, weights, self.d_in), build_reference(up, weights, self.d_out)


class Lora(nn.Module):
    """LoRA as one would write it by hand; without a base the adapter alone."""

    def __init__(self, width: int, base: nn.Linear | None = None) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(width, RANK, bias=False)
        self.up = nn.Linear(RANK, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(self.down(x)) * (1 / RANK)
        return change if self.base is None else self.base(x) + change


class Layers:
    """Every contender for one width, order, number of tokens and of tasks, on the same base and leaves."""

    def __init__(self, width: int, order: int, tokens: int, tasks: int) -> None:
        torch.manual_seed(width + order)
        rows = max(tasks, 1)
        self.width, self.tasks = width, torch.arange(rows)
        self.x = torch.randn(rows, max(1, tokens // rows), width, requires_grad=True)
        self.gradient = torch.randn_like(self.x)
        leaves = [[0.3 * torch.randn(TERMS, RANK, q) for q in ceil_radices(width, order)] for _ in range(2)]
        self.base = nn.Linear(width, width, bias=False).requires_grad_(False)
        self.ours = TensorExperts(*leaves, width, width)
        self.written_out = Materialising(*([leaf.clone() for leaf in side] for side in leaves), width, width)
        self.lora = Lora(width)
        self.weights = torch.rand(rows, 1, TERMS).requires_grad_()
        self.logits = torch.randn(TASKS, TERMS)
        self.condition = Condition(task_ids=self.tasks)

    def twin(self) -> nn.Linear:
        """PEFT replaces the layer in its model, so it gets one of its own on the same weight."""
        layer = nn.Linear(self.width, self.width, bias=False, device="meta")
        layer.weight = self.base.weight
        return layer

    def mixture(self, experts: TensorExperts) -> Mixture:
        mixture = Mixture(self.base, TaskLogits(self.logits.clone()), experts)
        mixture.channel.condition = self.condition
        return mixture

    def adapters(self) -> dict[str, Callable[[], Tensor]]:
        """x -> A -> B alone."""
        routing = Routing(self.weights, TERMS)
        return {
            OURS: lambda: self.ours(self.x, routing, self.condition),
            WRITTEN_OUT: lambda: self.written_out(self.x, routing, self.condition),
            LORA: lambda: self.lora(self.x),
        }

    def forget(self) -> None:
        """Let the materialising form build anew in evaluation, where it would keep its factors as ours are kept."""
        self.written_out.forget()

    def layers(self) -> dict[str, Callable[[], Tensor]]:
        """The whole layer with its base."""
        ours, written_out = self.mixture(self.ours), self.mixture(self.written_out)
        lora, skills = Lora(self.width, self.base), poly(self.twin(), TERMS, TASKS, RANK)
        return {
            OURS: lambda: ours(self.x),
            WRITTEN_OUT: lambda: written_out(self.x),
            LORA: lambda: lora(self.x),
            POLY: lambda: skills(self.x, task_ids=self.tasks),
        }

    def evaluated(self) -> dict[str, Callable[[], Tensor]]:
        """The whole layer in eval mode: our task's factors are kept, the materialising form has no such thing."""
        ours, written_out = self.mixture(self.ours).eval(), self.mixture(self.written_out).eval()
        lora, skills = Lora(self.width, self.base).eval(), poly(self.twin(), TERMS, TASKS, RANK).eval()
        down, up = self.lora.down.weight.detach(), self.lora.up.weight.detach()
        adapted = with_adapters(self.twin(), down[None], up[None], 1 / RANK).base_model.model.site
        runs: dict[str, Callable[[], Tensor]] = {
            BARE: lambda: self.base(self.x),
            OURS: lambda: ours(self.x),
            WRITTEN_OUT: lambda: (self.forget(), written_out(self.x))[1],
            LORA: lambda: lora(self.x),
            PEFT_LORA: lambda: adapted(self.x),
            POLY: lambda: skills(self.x, task_ids=self.tasks),
        }
        return runs


def step(run: Callable[[], Tensor], gradient: Tensor) -> Callable[[], object]:
    """Forward and backward, every gradient included."""
    return lambda: run().backward(gradient)


def check(layers: Layers) -> None:
    """The two forms give the same output and gradients, and so does LoRA with the factors that are built."""
    runs, x = layers.adapters(), layers.x
    inputs = [x, layers.weights, *layers.ours.leaves()], [x, layers.weights, *layers.written_out.leaves()]
    found = [
        (out := runs[name](), *torch.autograd.grad(out, given, layers.gradient))
        for name, given in zip((OURS, WRITTEN_OUT), inputs, strict=True)
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    with torch.no_grad():
        factors = layers.ours.factors(layers.weights[:, 0])
        torch.testing.assert_close(low_rank(x, *factors, scale=1 / RANK), found[0][0], rtol=1e-3, atol=1e-2)


def measure(width: int, order: int, tokens: int, tasks: int, *, rounds: int, cpu: bool) -> dict[str, Any]:
    """Times of every contender in the five situations."""
    layers = Layers(width, order, tasks=tasks, tokens=tokens)
    check(layers)
    times: dict[str, Any] = {}
    adapters = layers.adapters()
    stepped = {name: step(run, layers.gradient) for name, run in adapters.items()}
    times["adapter, step"] = summary(alternate(stepped, rounds=rounds, cpu=cpu), LORA)
    with torch.no_grad():
        times["adapter, forward"] = summary(alternate(adapters, rounds=rounds, cpu=cpu), LORA)
    layers.ours.eval()
    layers.written_out.eval()
    kept = adapters | {WRITTEN_OUT: lambda: (layers.forget(), adapters[WRITTEN_OUT]())[1]}
    with torch.inference_mode():
        times["adapter, evaluation"] = summary(alternate(kept, rounds=rounds, cpu=cpu), LORA)
    layers.ours.train()
    layers.written_out.train()
    whole = {name: step(run, layers.gradient) for name, run in layers.layers().items()}
    times["layer, step"] = summary(alternate(whole, rounds=rounds, cpu=cpu), LORA)
    evaluated = layers.evaluated()
    with torch.inference_mode():
        times["layer, evaluation"] = summary(alternate(evaluated, rounds=rounds, cpu=cpu), LORA)
    return {"width": width, "order": order, "tokens": tokens, "tasks": tasks, "times": times}


def thin(times: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """What is kept of a table: ratios follow from it."""
    wanted = ("runs", "median_ms", "quartile1_ms", "quartile3_ms", "least_ms")
    return {name: {key: round(row[key], 4) for key in wanted} for name, row in times.items()}


def ratio(case: Mapping[str, Any], situation: str, over: str, under: str, key: str = "median_ms") -> float:
    """How many times as long `over` takes as `under`."""
    times = case["times"][situation]
    return times[over][key] / times[under][key]


def verdict(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar with the worst case measured, by medians and by the quickest runs, and how many cases miss it."""
    few = [case for case in cases if case["order"] == 4 and case["tokens"] <= 32]
    many = [case for case in cases if case["tokens"] == 1024]
    trained = ("adapter, step", "layer, step")
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, least: float, found: list[tuple[dict[str, Any], str, str, str]]) -> None:
        ratios = [(ratio(*one), ratio(*one, key="least_ms"), one) for one in found]
        if not ratios:
            return
        worst = min(ratios, key=lambda entry: entry[0])
        case = worst[2][0]
        bars[name] = {
            "at_least": least,
            "worst_of_medians": worst[0],
            "worst_of_least": min(entry[1] for entry in ratios),
            "worst_case": {key: case[key] for key in ("width", "order", "tokens", "tasks")}
            | {"situation": worst[2][1]},
            "missed_by_medians": sum(entry[0] < least for entry in ratios),
            "missed_by_least": sum(entry[1] < least for entry in ratios),
            "cases": len(ratios),
        }

    for situation in ("adapter, step", "adapter, forward", "adapter, evaluation", "layer, step", "layer, evaluation"):
        bar(f"materialising / ours, {situation}", 1.0, [(case, situation, WRITTEN_OUT, OURS) for case in cases])
    for situation in ("adapter, step", "adapter, forward", "adapter, evaluation"):
        name = f"materialising / ours, order 4, 1 to 32 tokens, {situation}"
        bar(name, 3.0, [(case, situation, WRITTEN_OUT, OURS) for case in few])
    for situation in trained:
        name = f"plain LoRA / ours, 1024 tokens, {situation}"
        bar(name, 1 / 1.15, [(case, situation, LORA, OURS) for case in many])
    for other in (LORA, PEFT_LORA):
        one = [case for case in cases if case["tasks"] == 1]
        bar(
            f"{other} / ours, evaluation, one kept task",
            1.0,
            [(case, "layer, evaluation", other, OURS) for case in one],
        )
    for situation in ("layer, step", "layer, evaluation"):
        bar(f"PEFT Poly / ours, {situation}", 1.0, [(case, situation, POLY, OURS) for case in cases])
    return bars


SHOWN = (
    ("adapter, step", WRITTEN_OUT, None),
    ("adapter, forward", WRITTEN_OUT, None),
    ("adapter, evaluation", WRITTEN_OUT, None),
    ("layer, step", WRITTEN_OUT, None),
    ("layer, step", LORA, None),
    ("layer, evaluation", LORA, 1),
    ("layer, evaluation", PEFT_LORA, 1),
    ("layer, step", POLY, None),
    ("layer, evaluation", POLY, None),
)


def ranges(cases: list[dict[str, Any]]) -> str:
    """Medians of the other over ours, least and largest over widths and tasks, as a Markdown table."""
    lines = ["| | against | order | 1 token | 32 tokens | 1024 tokens |", "| --- | --- | --- | --- | --- | --- |"]
    for situation, other, tasks in SHOWN:
        for order in (2, 4):
            cells: list[str] = []
            for tokens in (1, 32, 1024):
                rows = [
                    case["times"][situation]
                    for case in cases
                    if (case["order"], case["tokens"]) == (order, tokens) and tasks in (None, case["tasks"])
                ]
                found = [row[other]["median_ms"] / row[OURS]["median_ms"] for row in rows if other in row]
                cells.append(f"{min(found):.2f} .. {max(found):.2f}" if found else "-")
            one = ", one task" if tasks else ""
            lines.append(f"| {situation}{one} | {other} | {order} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 768 only, fewer rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread, for a busy machine")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--name", default="tensor_layer", help="of the file in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the table of what is stored")
    given = parser.parse_args()
    if given.report:
        print(ranges(json.loads((RESULTS / f"{given.name}.json").read_text())["cases"]))
        return
    torch.set_num_threads(given.threads)
    started = time.process_time()
    cases: list[dict[str, Any]] = []
    for width in given.widths or ((768,) if given.quick else (768, 2048, 4096)):
        for order in (2, 4):
            for tokens in (1, 32, 1024):
                for tasks in (1, 8):
                    rounds = given.rounds or {1: 100, 32: 60, 1024: 9}[tokens] // (3 if given.quick else 1)
                    case = measure(width, order, tokens, tasks, rounds=rounds, cpu=given.cpu_time)
                    for situation, times in case["times"].items():
                        show(f"{situation}: d {width}, order {order}, {tokens} tokens, {tasks} tasks", times)
                    cases.append(case)
    bars = verdict(cases)
    for name, bar in bars.items():
        print(
            name,
            *(f"{key}={value:.2f}" if isinstance(value, float) else f"{key}={value}" for key, value in bar.items()),
        )
    clock = "processor" if given.cpu_time else "wall"
    cases = [case | {"times": {name: thin(times) for name, times in case["times"].items()}} for case in cases]
    print(f"written: {write(given.name, {'clock': clock, 'machine': machine(started), 'cases': cases, 'bars': bars})}")


if __name__ == "__main__":
    main()
