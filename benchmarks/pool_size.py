"""The file of a pool of sparse interpolated experts against as many fine-tuned copies of its backbone.

    python -m benchmarks.pool_size [--experts 8] [--sparsity 0.9] [--layers 12]
    python -m benchmarks.pool_size --trained [FOLDER]  # of pools that benchmarks.few_shot has trained
    python -m benchmarks.pool_size --report

Shapes of a ViT-S/16 (21.7 M weights); copies in float32. Masks are drawn: *independent*, the worst case, and *alike*,
by logits that share a part, so that two experts overlap as trained ones did (intersection over union 0.46 in the pilot
of the method's notes). A mask that is not 0 costs more where it is not 1 either, and which share of them that is
depends on training: it is given as three cases. What is written is what `save_pretrained` writes, router included.

`--trained`: the rows of the few-shot benchmark, a ViT of 138,368 weights. Beside so few the router, which grows with
the square of the width alone, is large; so the experts' part of the file is given apart from the whole.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.record import surroundings, write_json
from mixwright.experts.overlap import overlap
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.packing import Storage, pack
from mixwright.ops.hard_concrete import DEAD, LIMIT
from mixwright.routers.support_set import SupportSetRouter

RESULT = Path(__file__).parent / "results" / "pool_size.json"
ROWS = Path.home() / ".cache/mixwright/few_shot_rows"
STORAGES: tuple[Storage, ...] = ("exact", "compact")
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


def size(deltas: SparseDeltas, router: Mapping[str, torch.Tensor], storage: Storage) -> int:
    """Bytes of the file."""
    with tempfile.TemporaryDirectory() as place:
        save_file(pack(deltas, storage) | dict(router), Path(place) / "added.safetensors")
        return (Path(place) / "added.safetensors").stat().st_size


def trained_pool(file: Path) -> tuple[SparseDeltas, dict[str, torch.Tensor]] | None:
    """The experts and the router's tensors of a row of the few-shot benchmark; None where it is no pool of masks."""
    state = torch.load(file, weights_only=True)["state"]
    names = {name.removeprefix("experts.delta.") for name in state if name.startswith("experts.delta.")}
    logits = {name: state.get(f"experts.logits.{name}") for name in names}
    shapes = {name: state[f"experts.delta.{name}"].shape for name in sorted(names)}
    counts = {len(found) if found is not None and found.shape[1:] == shapes[n] else 0 for n, found in logits.items()}
    if len(counts) != 1 or min(counts) < 2:
        return None
    deltas = SparseDeltas({name.replace("/", "."): shape for name, shape in shapes.items()}, counts.pop())
    deltas.load_state_dict({n.removeprefix("experts."): t for n, t in state.items() if n.startswith("experts.")})
    return deltas, {n.removeprefix("router."): t.clone() for n, t in state.items() if n.startswith("router.")}


def trained_case(name: str, deltas: SparseDeltas, router: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What a trained pool came to, and its bytes, with the router and without."""
    found, weights = overlap(deltas), deltas.num_weights
    copies = deltas.num_experts * weights * 4
    pairs = ~torch.eye(deltas.num_experts, dtype=torch.bool)
    case: dict[str, Any] = {
        "row": name,
        "experts": deltas.num_experts,
        "weights": weights,
        "density": float(found.density.mean()),
        "union": found.union,
        "overlap": float(found.iou[pairs].mean()),
        "fractional": float((found.fractional / found.density.clamp_min(1e-12)).mean()),
        "bytes": {kind: size(deltas, router, kind) for kind in STORAGES},
        "bytes_of_experts": {kind: size(deltas, {}, kind) for kind in STORAGES},
        "copies_bytes": copies,
    }
    case["share"] = {kind: number / copies for kind, number in case["bytes"].items()}
    case["share_of_experts"] = {kind: number / copies for kind, number in case["bytes_of_experts"].items()}
    return case


def trained_report(cases: list[dict[str, Any]]) -> str:
    """Markdown: one row for each trained pool."""
    heads = ["row", "experts", "density", "overlap", "union", "not 0 or 1", "exact", "compact"]
    lines = [f"| {' | '.join([*heads, 'experts alone, exact', 'compact'])} |", "| --- " * 10 + "|"]
    for case in cases:
        cells = [case["row"], str(case["experts"])]
        cells += [f"{case[key]:.2f}" for key in ("density", "overlap", "union")] + [f"{case['fractional']:.0%}"]
        cells += [f"{case['bytes'][k] / 1e3:.0f} kB, {100 * case['share'][k]:.1f} %" for k in STORAGES]
        cells += [f"{100 * case['share_of_experts'][k]:.1f} %" for k in STORAGES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_trained(folder: Path) -> list[dict[str, Any]]:
    """Every pool of masks in a folder of rows. SystemExit where there is none."""
    cases: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.pt")):
        pool = trained_pool(file)
        if pool is not None:
            cases.append(trained_case(file.stem, *pool))
    if not cases:
        raise SystemExit(f"{folder} holds no trained pool; python -m benchmarks.few_shot trains some.")
    return cases


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
    parser.add_argument("--trained", type=Path, nargs="?", const=ROWS, help="folder of the few-shot benchmark's rows")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        kept = json.loads(RESULT.read_text())
        print(report(kept), *([trained_report(kept["trained"])] if "trained" in kept else []), sep="\n\n")
        return
    if given.trained is not None:
        cases = measure_trained(given.trained)
        write_json(RESULT, {**json.loads(RESULT.read_text()), "trained": cases})
        print(trained_report(cases))
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
            bytes_ = {kind: size(deltas, router.state_dict(), kind) for kind in STORAGES}
            share = {kind: number / copies for kind, number in bytes_.items()}
            cases.append({"masks": masks, "fractional": fractional, **found, "bytes": bytes_, "share": share})
            print(cases[-1], flush=True)
    before = {"trained": json.loads(RESULT.read_text()).get("trained", [])} if RESULT.exists() else {}
    result = {**before, **surroundings(started), "weights": weights, "copies_bytes": copies, "bar": 0.1, "cases": cases}
    write_json(RESULT, result)
    print(report(result))


if __name__ == "__main__":
    main()
