"""The file of a pool of sparse interpolated experts against as many fine-tuned copies of its backbone.

    python -m benchmarks.pool_size [--experts 8] [--sparsity 0.9] [--layers 12]
    python -m benchmarks.pool_size --report

Shapes of a ViT-S/16 (21.7 M weights); copies in float32. Masks are drawn: *independent*, the worst case, and *alike*,
by logits that share a part, so that two experts overlap as trained ones did (intersection over union 0.46 in the pilot
of the method's notes). A mask that is not 0 costs more where it is not 1 either, and which share of them that is
depends on training: it is given as three cases. What is written is what `save_pretrained` writes, router included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.record import surroundings, write_json
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.packing import Storage, pack
from mixwright.ops.hard_concrete import DEAD, LIMIT
from mixwright.routers.support_set import SupportSetRouter

RESULT = Path(__file__).parent / "results" / "pool_size.json"
KINDS = {"independent": 0.0, "alike": 0.82}
"""How much of a logit all experts share: its variance."""
WIDTH, HIDDEN = 384, 1536


def shapes_of(layers: int) -> dict[str, torch.Size]:
    """Parameters of a ViT-S/16 without a pooler."""
    found = {
        "cls": (1, 1, WIDTH),
        "position": (1, 197, WIDTH),
        "patch.weight": (WIDTH, 3, 16, 16),
        "patch.bias": (WIDTH,),
    }
    for layer in range(layers):
        for part in ("query", "key", "value", "out"):
            found |= {f"{layer}.{part}.weight": (WIDTH, WIDTH), f"{layer}.{part}.bias": (WIDTH,)}
        found |= {f"{layer}.up.weight": (HIDDEN, WIDTH), f"{layer}.up.bias": (HIDDEN,)}
        found |= {f"{layer}.down.weight": (WIDTH, HIDDEN), f"{layer}.down.bias": (WIDTH,)}
        found |= {f"{layer}.{norm}.{part}": (WIDTH,) for norm in ("before", "after") for part in ("weight", "bias")}
    found |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return {name: torch.Size(shape) for name, shape in found.items()}


@torch.no_grad()
def fill(deltas: SparseDeltas, shared: float, sparsity: float, fractional: float) -> dict[str, float]:
    """Draw masks and the change; what the masks came to: density, union, mean intersection over union."""
    draw = torch.Generator().manual_seed(0)
    edge = 2**0.5 * float(torch.erfinv(torch.tensor(2 * sparsity - 1)))
    count, experts = 0, deltas.num_experts
    both = torch.zeros(experts, experts, dtype=torch.float64)
    union = 0
    for key, logits in deltas.logits.items():
        common = torch.randn(logits.shape[1:], generator=draw) * shared**0.5
        for row in logits:
            live = common + torch.randn(row.shape, generator=draw) * (1 - shared) ** 0.5 > edge
            inside = (torch.rand(row.shape, generator=draw) * 2 - 1) * -DEAD * 0.99
            part = torch.rand(row.shape, generator=draw) < fractional
            row.copy_(torch.where(live, torch.where(part, inside, LIMIT), -LIMIT))
        deltas.delta[key].copy_(torch.randn(deltas.delta[key].shape, generator=draw) * 1e-3)
        alive = (logits > DEAD).flatten(1)
        both += alive.float() @ alive.float().T
        union += int(alive.any(0).sum())
        count += alive.shape[1]
    own = both.diagonal()
    overlap = both / (own[:, None] + own[None] - both)
    pairs = overlap[~torch.eye(experts, dtype=torch.bool)]
    return {"density": float(own.mean()) / count, "union": union / count, "overlap": float(pairs.mean())}


def size(deltas: SparseDeltas, router: SupportSetRouter, storage: Storage) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as place:
        save_file(pack(deltas, storage) | router.state_dict(), Path(place) / "added.safetensors")
        return (Path(place) / "added.safetensors").stat().st_size


def report(result: dict[str, Any]) -> str:
    """Markdown: one row for each case."""
    lines = ["| masks | overlap | union | not 0 or 1 | exact | compact |", "| --- | --- | --- | --- | --- | --- |"]
    for case in result["cases"]:
        shares = [
            f"{case['bytes'][kind] / 1e6:.1f} MB, {100 * case['share'][kind]:.1f} %" for kind in ("exact", "compact")
        ]
        lines.append(
            f"| {case['masks']} | {case['overlap']:.2f} | {case['union']:.2f} | {case['fractional']:.0%} | "
            f"{shares[0]} | {shares[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        print(report(json.loads(RESULT.read_text())))
        return
    started = time.process_time()
    deltas = SparseDeltas(shapes_of(given.layers), given.experts)
    router = SupportSetRouter(WIDTH, given.experts)
    weights = sum(delta.numel() for delta in deltas.delta.values())
    copies = given.experts * weights * 4
    cases: list[dict[str, Any]] = []
    for masks, shared in KINDS.items():
        for fractional in (0.0, 0.5, 1.0):
            found = fill(deltas, shared, given.sparsity, fractional)
            bytes_ = {kind: size(deltas, router, kind) for kind in ("exact", "compact")}
            share = {kind: number / copies for kind, number in bytes_.items()}
            cases.append({"masks": masks, "fractional": fractional, **found, "bytes": bytes_, "share": share})
            print(cases[-1], flush=True)
    result = {**surroundings(started), "weights": weights, "copies_bytes": copies, "bar": 0.1, "cases": cases}
    write_json(RESULT, result)
    print(report(result))


if __name__ == "__main__":
    main()
