"""Synthetic skills: 24 training and 8 held-out compositions of latent skills, every member of the family, no download.

    python -m benchmarks.skills_suite            # resumes from --cache what was measured before
    python -m benchmarks.skills_suite --quick    # a minute's walk through everything; its numbers say nothing

Learning rates are chosen per system on a world of its own (another seed: other skills, other tasks), with the same grid
and the same number of runs for each: the multitask rate on the validation examples of its training tasks, the few-shot
rates on its held-out tasks, apart for every number of shots and everything that may be trained. Then come the seeds.
An error is a mean squared error over the targets' power on 256 unseen examples: 1 is what the frozen backbone has.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import surroundings, write_json
from benchmarks.skills_members import (
    Member,
    TaskLayer,
    errors,
    fresh,
    merged_gap,
    numbers,
    routing_numbers,
    train,
    transfer,
)
from benchmarks.skills_world import Size, World, make_world

GRID = (2e-3, 6e-3, 2e-2, 6e-2)
TRANSFER_GRID = {"all": (1e-3, 3e-3, 1e-2, 3e-2), "mu": (1e-3, 3e-3, 1e-2, 3e-2), "z": (0.03, 0.1, 0.3, 1.0)}
ROUTER_LR = 0.1
TUNING_SEED = 1000


def member(name: str, experts: str, budget: str = "4608", private: bool = False, **settings: Any) -> Member:
    return Member(name=name, settings={"experts": experts, **settings}, private=private, budget=budget)


LORA = member("LoRA, shared", "lora", rank=16)
PRIVATE = member("LoRA, one per task", "poly", "24 x 1152", private=True, rank=4)
POLY = member("Poly", "poly", rank=2)
MHR = member("MHR", "mhr", rank=2, heads=8)
TLORA = member("TLoRA", "tlora", num_latent=6)
FIRST = member("TensorPoly-I", "tensorpoly-1", num_latent=6)
FIRST_RELEASED = member("TensorPoly-I, released", "tensorpoly-1", num_latent=6, init="released")
SECOND = member("TensorPoly-II", "tensorpoly-2", num_latent=6)
SECOND_RELEASED = member("TensorPoly-II, released", "tensorpoly-2", num_latent=6, init="released")
ENTANGLED_2 = member("entangled G=2", "entangled", groups=2, num_latent=3)
ENTANGLED_3 = member("entangled G=3", "entangled", groups=3, num_latent=2)
LARGER = (
    member("LoRA r=32", "lora", "9216", rank=32),
    member("Poly r=4", "poly", "9216", rank=4),
    member("TensorPoly-I R=12", "tensorpoly-1", "9216", num_latent=12),
    member("entangled G=6", "entangled", "9216", groups=6, num_latent=2),
    member("entangled G=4", "entangled", "9216", groups=4, num_latent=3),
)
FOURTH = (
    member("TensorPoly-I N=4", "tensorpoly-1", "4480", num_latent=10, order=4, factorization="exact"),
    member("entangled N=4 G=5", "entangled", "4480", groups=5, num_latent=2, order=4, factorization="exact"),
)
FAMILY = (LORA, PRIVATE, POLY, MHR, TLORA, FIRST, FIRST_RELEASED, SECOND, SECOND_RELEASED, ENTANGLED_2, ENTANGLED_3)
CALIBRATION = (
    member("LoRA r=16", "lora", "8192", rank=16),
    member("Poly r=4", "poly", "16384", rank=4),
    member("TLoRA", "tlora", "8192", num_latent=8),
    member("TensorPoly-I", "tensorpoly-1", "8192"),
    member("TensorPoly-II", "tensorpoly-2", "8192"),
    member("entangled G=2", "entangled", "8192", groups=2, num_latent=4),
    member("entangled G=4", "entangled", "8192", groups=4, num_latent=2),
)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Members on one kind of world. `rates` of one value is no search; `one_rate` gives Z the experts' rate.

    `steps` in place of the run's, at a `constant_rate` in place of the published schedule: as in the pilot.
    """

    name: str
    members: Sequence[Member]
    size: Size
    column_rank: int
    rates: Sequence[float] = GRID
    one_rate: bool = False
    few_shot: Sequence[Member] = ()
    steps: int | None = None
    constant_rate: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seeds and lengths of everything."""

    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    steps: int = 600
    transfer_steps: int = 100


def exams(quick: bool) -> tuple[Exam, ...]:
    """Plain low-rank skills first; then the same where columns are tensor products, and what single claims need."""
    if quick:
        tiny = Size(width=36, train_tasks=8, held_out_tasks=4, examples=24, shots=(4, 16), test_examples=32)
        few = (LORA, POLY, FIRST, ENTANGLED_3)
        return (
            Exam(name="plain", members=few, size=tiny, column_rank=6, few_shot=few[1:], rates=GRID[1:3]),
        )  # fmt: skip
    size, pilot = Size(skill_rank=1, width=144), Size(num_skills=4, parts=(2,))
    tensors = (FIRST, SECOND, ENTANGLED_2, ENTANGLED_3)
    return (
        Exam(name="plain", members=(*FAMILY, *FOURTH, *LARGER), size=size, column_rank=12,
             few_shot=(*FAMILY[:8], ENTANGLED_3, LARGER[1])),
        Exam(name="separable", members=(LORA, POLY, TLORA, *tensors), size=size, column_rank=1),
        Exam(name="calibration", members=CALIBRATION, size=pilot, column_rank=16, rates=(3e-3,),
             steps=1200, constant_rate=True),
        Exam(name="one learning rate", members=(POLY, FIRST, ENTANGLED_3), size=size, column_rank=12, one_rate=True),
        Exam(name="between", members=(LORA, POLY, *tensors), size=size, column_rank=3),
        Exam(name="seen compositions", members=(LORA, POLY, FIRST), size=replace(size, seen=True), column_rank=12,
             few_shot=(LORA, POLY, FIRST)),
    )  # fmt: skip


def measure(exam: Exam, one: Member, run: Run, say: Callable[[str], None]) -> dict[str, Any]:
    """Rates on the tuning world, then the seeds."""
    size, began = exam.size, time.process_time()
    tuning = make_world(TUNING_SEED, exam.column_rank, size)
    found: dict[float, tuple[float, TaskLayer]] = {}
    for lr in exam.rates if len(exam.rates) > 1 else ():
        layer = multitask(exam, one, tuning, run, lr, TUNING_SEED)
        found[lr] = (float(errors(layer, tuning.train.validation).mean()), layer)
    rate = min(found, key=lambda lr: found[lr][0], default=exam.rates[0])
    result: dict[str, Any] = {
        "settings": {**one.settings, "private": one.private}, "budget": one.budget,
        "numbers": numbers(one, size.width, size.train_tasks),
        "learning_rate": rate, "tuning": {str(lr): error for lr, (error, _) in found.items()},
        "held_in": [], "by_task": [], "train": [], "routing": [], "merged_gap": [],
    }  # fmt: skip
    say(f"rate {rate:g} of {', '.join(f'{lr:g}: {error:.3f}' for lr, (error, _) in found.items())}")
    shared: list[tuple[World, TaskLayer]] = []
    for seed in run.seeds:
        world = make_world(seed, exam.column_rank, size)
        layer = multitask(exam, one, world, run, rate, seed)
        each = errors(layer, world.train.test)
        result["held_in"].append(float(each.mean()))
        result["by_task"].append(each.tolist())
        result["train"].append(float(errors(layer, world.train.train).mean()))
        result["routing"].append(routing_numbers(layer.weights(size.train_tasks)))
        result["merged_gap"].append(merged_gap(layer, world.train.test))
        shared.append((world, layer))
    if one in exam.few_shot:
        result["few_shot"] = dict(few_shot(one, (tuning, found[rate][1]), shared, run))
    result["cpu_seconds"] = time.process_time() - began
    return result


def multitask(exam: Exam, one: Member, world: World, run: Run, lr: float, seed: int) -> TaskLayer:
    """The first stage."""
    layer = fresh(one, exam.size.width, exam.size.train_tasks, seed)
    steps, cooldown = exam.steps or run.steps, 0.0 if exam.constant_rate else 0.94
    return train(layer, world.train.train, steps, lr, lr if exam.one_rate else ROUTER_LR, cooldown)


def few_shot(
    one: Member, tuning: tuple[World, TaskLayer], seeds: Sequence[tuple[World, TaskLayer]], run: Run
) -> Iterator[tuple[str, dict[str, Any]]]:
    """For everything that may be trained and every number of shots: the rate, and the error of each seed."""

    def error(world: World, layer: TaskLayer, what: Any, shots: int, lr: float, seed: int) -> float:
        given = world.held_out.train.first(shots)
        return float(
            errors(transfer(layer, one, what, given, run.transfer_steps, lr, seed), world.held_out.test).mean()
        )

    for what in one.transfers:
        for shots in tuning[0].shots:
            tuned = {lr: error(*tuning, what, shots, lr, TUNING_SEED) for lr in TRANSFER_GRID[what]}
            rate = min(tuned, key=lambda lr: tuned[lr])
            scores = [error(world, layer, what, shots, rate, 77 + at) for at, (world, layer) in enumerate(seeds)]
            rates = {str(lr): error for lr, error in tuned.items()}
            yield f"{what}/{shots}", {"learning_rate": rate, "tuning": rates, "error": scores}


def all_zero(exam: Exam, run: Run) -> dict[str, Any]:
    """Every leaf of B at zero: the largest change of any leaf after training at each rate, and the error."""
    moved, error = 0.0, []
    for seed in run.seeds:
        world = make_world(seed, exam.column_rank, exam.size)
        for lr in GRID:
            layer = fresh(FIRST, exam.size.width, exam.size.train_tasks, seed)
            with torch.no_grad():
                for leaf in layer.experts.up:  # type: ignore[union-attr]
                    leaf.zero_()
            before = [leaf.detach().clone() for leaf in layer.experts.parameters()]
            train(layer, world.train.train, min(30, run.steps), lr, ROUTER_LR)
            after = [leaf.detach() for leaf in layer.experts.parameters()]
            changes = [float((a - b).abs().max()) for a, b in zip(after, before)]
            moved = max(moved, *changes)
        error.append(float(errors(layer, world.train.test).mean()))
    return {"largest_change_of_a_leaf": moved, "held_in": error, "rates": list(GRID)}


def main(arguments: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Measure what the cache lacks, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/benchmarks/skills_suite"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--exams", nargs="+", help="measure only these, for the cache; nothing is written")
    parser.add_argument("--members", nargs="+", help="and of these only the members of these names")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = Run(seeds=(0,), steps=60, transfer_steps=20) if args.quick else Run()
    out = args.out or Path(f"{'build/benchmarks' if args.quick else 'benchmarks/results'}/skills_suite.json")
    cache = args.cache.with_name("skills_suite_quick") if args.quick else args.cache
    started, chosen = time.process_time(), exams(args.quick)
    results: dict[str, Any] = {exam.name: {} for exam in chosen}
    cells = [(exam, one) for exam in chosen for one in exam.members if exam.name in (args.exams or results)]
    cells = [(exam, one) for exam, one in cells if one.name in (args.members or [one.name])]
    for at, (exam, one) in enumerate(cells):
        kept = cache / f"{exam.name} {one.name}.json".replace(" ", "_").replace(",", "")
        if not kept.exists():
            began = f"[{at + 1}/{len(cells)}, {time.process_time() - started:.0f} s] {exam.name}: {one.name}"
            write_json(kept, measure(exam, one, run, lambda text, began=began: print(began, text, flush=True)))
        results[exam.name][one.name] = json.loads(kept.read_text())
        print(f"    held-in {results[exam.name][one.name]['held_in']}", flush=True)
    if args.exams or args.members:
        return results
    results["all_zero"] = all_zero(chosen[-1], run)
    spent = sum(one["cpu_seconds"] for exam in chosen for one in results[exam.name].values())
    settings = {"seeds": list(run.seeds), "steps": run.steps, "transfer_steps": run.transfer_steps}
    whole = {"results": results, "settings": settings, **surroundings(started), "cpu_seconds": round(spent, 1)}
    write_json(out, whole)
    return whole


if __name__ == "__main__":
    main()
