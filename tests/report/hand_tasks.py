"""Models routed by task made by hand, so that their page can be tested without one, at any size."""

from math import cos

import torch

from mixwright.evaluation.linkage import average_linkage, leaf_order
from mixwright.evaluation.step_time import StepTimes
from mixwright.evaluation.task_routing import LayerParts, TaskRouting, TaskTable

TASKS = ["topic", "mood", "topic again"]
TIMES = StepTimes(train=40.25, evaluate=12.5, backbone=10.0, rows=8, tokens=64, threads=1, device="cpu")
COMMAND = "mixwright explain multitask --measure"


def task_routing(
    tasks: list[str] | None = None, experts: int = 4, layers: int = 4, orders: int = 1, shared: bool = False
) -> TaskRouting:
    """Weights and shares that wave across tasks, experts and layers; every tenth share works against the others."""
    names = TASKS if tasks is None else tasks
    sites = [f"model.layers.{layer // 2}.mlp.{'up' if layer % 2 else 'down'}_proj" for layer in range(layers)]

    def wave(layer: int, task: int, order: int) -> list[float]:
        raw = [1.1 + cos(layer + 2.7 * (task % 7) + 1.9 * expert + order) for expert in range(experts)]
        return [value / sum(raw) for value in raw]

    def share(layer: int, task: int) -> list[list[float]]:
        rows = [wave(layer, task, order) for order in range(orders)]
        return [[-value if (task + expert) % 10 == 9 else value for expert, value in enumerate(row)] for row in rows]

    tables = [
        TaskTable(
            sites=sites if shared else [site],
            positions=[f"order {order + 1}" for order in range(orders)] if orders > 1 else [""],
            weights=[[wave(place, task, order) for order in range(orders)] for task in range(len(names))],
            discreteness=0.5,
            sparsity=0.25,
            usage=0.9,
            peakiness=0.3,
            separation=0.2,
            agreement=0.75,
        )
        for place, site in enumerate(sites[: 1 if shared else layers])
    ]
    parts = [
        LayerParts(
            site=site,
            depth=".".join(site.split(".")[:3]),
            router=0 if shared else place,
            share=[share(place, task) for task in range(len(names))],
            size=[1.0] * len(names),
            change=[0.05] * len(names),
            overlap=torch.eye(experts).tolist(),
            cancelling=1.0,
        )
        for place, site in enumerate(sites)
    ]
    angle = torch.arange(len(names)).double()
    distances = (angle[:, None] * 0.37).sin().sub((angle[None] * 0.37).sin()).abs() / 2
    merges = average_linkage(distances)
    return TaskRouting(
        tasks=names,
        experts=[f"latent-{expert}" for expert in range(experts)],
        routers=tables,
        layers=parts,
        distances=distances.tolist(),
        merges=merges,
        order=leaf_order(merges, len(names)),
        agreement=0.75,
        cost={
            "sites": layers,
            "stored": 11_132_928,
            "router": 1_081_728,
            "router_per_task": 3_456,
            "trained": 12_214_656,
            "per_latent": 1_391_616,
            "merged": 35_389_440,
            "merged_rank": 16,
            "dead": 7,
        },
        composition={"method": "tensorpoly", "config": {"tasks": names}, "backbone": {"fingerprint": "f1n9e4"}},
    )
