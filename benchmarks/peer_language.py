"""Language modelling with PEER in the middle block: more experts, more active experts, and its rivals. No download.

    python -m benchmarks.peer_language            # resumes from --cache what was measured before
    python -m benchmarks.peer_language --report   # the tables of the method's README
    python -m benchmarks.peer_language --quick    # a minute's walk through everything; its numbers say nothing

Text: WikiText-2's validation file and the standard library's own source; tested on the first part of WikiText-2's test
file and on every 20th file of the library. Tokens are a byte-level BPE of the training text. All systems see the same
batches, in the same order, for a seed. Learning rates are chosen on a seed of their own, on the training text's end.
`dense` is trained once more for each rival that costs more floating-point operations, for steps
that cost the same.
"""

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixwright as mw
from benchmarks.peer_language_models import (
    BALANCE,
    CoarseExperts,
    Size,
    System,
    language_model,
    middle,
    operations,
)
from benchmarks.record import surroundings, write_json

RESULT = Path("benchmarks/results/peer_language.json")
RATES = (2e-3, 4e-3, 8e-3)
TABLE_RATES = (4.0, 10.0)
TUNING_SEED = 1000
HEADS, TOP_K, DIM_KEY = 4, 16, 64


def peer(n: int, norm: str = "batch", heads: int = HEADS, top_k: int = TOP_K, kind: str = "peer") -> System:
    label = f"{n}^2" if kind == "peer" else f"PKM {n}^2"
    return System(
        name=f"{label} h{heads} k{top_k} {norm}",
        kind=kind,
        settings={
            "num_experts": (n, n),
            "heads": heads,
            "top_k": top_k,
            "dim_key": DIM_KEY,
            "query_norm": norm,
        },
    )


DENSE = System(name="dense", kind="dense")
COARSE = System(name="MoE 8, 2 active", kind="moe", settings={"hidden": 192, "experts": 8, "top_k": 2})
SIZES = (64, 128, 256, 512)
ACTIVE = ((2, 8), (4, 8), (8, 16), (8, 32))
CAUSAL = ("past_batch", "layer", "rms")


def systems() -> tuple[System, ...]:
    """Rivals; more experts, with and without batch norm; other norms; more active experts."""
    more = [peer(n, norm) for n in SIZES for norm in ("batch", "none")]
    norms = [peer(128, norm) for norm in CAUSAL]
    active = [peer(128, heads=h, top_k=k) for h, k in ACTIVE]
    return (DENSE, COARSE, peer(128, kind="pkm"), *more, *norms, *active)


class Texts:
    """Token ids of the training text, of its last part for choosing, and of the test texts by name."""

    def __init__(self, data: Path, size: Size, most: int) -> None:
        from tokenizers import ByteLevelBPETokenizer

        library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        held_out = library[::20]
        code = "\n".join(file.read_text(errors="replace") for file in library if file not in held_out)
        wiki = (data / "valid.txt").read_text()
        self.tokenizer = ByteLevelBPETokenizer()
        self.tokenizer.train_from_iterator([wiki, code[:most]], vocab_size=size.vocabulary, show_progress=False)
        pieces = [chunk for text in (wiki, code[:most]) for chunk in _chunks(text)]
        torch.manual_seed(0)
        order = torch.randperm(len(pieces)).tolist()
        ids = self._ids("".join(pieces[i] for i in order))
        cut = len(ids) - 40_000
        self.train, self.choosing = ids[:cut], ids[cut:]
        test = {
            "wikitext2": (data / "test.txt").read_text()[:200_000],
            "library": "\n".join(file.read_text(errors="replace") for file in held_out)[:200_000],
        }
        self.test = {name: self._ids(text) for name, text in test.items()}

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def batches(self, size: Size, seed: int) -> Iterator[Tensor]:
        """Windows at random places, the same for every system."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(0, len(self.train) - size.length - 1, (size.batch,), generator=draw)
            yield torch.stack([self.train[start : start + size.length + 1] for start in starts.tolist()])


def _chunks(text: str, length: int = 4000) -> list[str]:
    return [text[start : start + length] for start in range(0, len(text), length)]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def trained(system: System, size: Size, texts: Texts, seed: int, steps: int, rate: float, table: float) -> nn.Module:
    """AdamW, exact on every row of a table; a tenth of warm-up, then down to zero along a cosine."""
    model = language_model(system, size, seed).train()
    optimizer = mw.LazyAdamW(model, lr=rate, table_lr=rate * table, betas=(0.9, 0.98), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, windows in zip(range(steps), texts.batches(size, seed)):
        share = min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.zero_grad()
        loss = loss_of(model, windows)
        if isinstance(middle(model), CoarseExperts):
            loss = loss + BALANCE * middle(model).balance
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    optimizer.flush()
    return model.eval()


@torch.no_grad()
def tested(model: nn.Module, size: Size, ids: Tensor) -> float:
    """Mean loss in nats per token over consecutive windows."""
    count = (len(ids) - 1) // size.length
    windows = torch.stack([ids[i * size.length : i * size.length + size.length + 1] for i in range(count)])
    return sum(loss_of(model, part).item() * len(part) for part in windows.split(64)) / count


def measured(system: System, size: Size, texts: Texts, seed: int, steps: int, rate: float, table: float) -> Any:
    started = time.process_time()
    model = trained(system, size, texts, seed, steps, rate, table)
    seconds = time.process_time() - started
    usage: dict[str, float] = {}
    if isinstance(middle(model), CoarseExperts):
        losses = {name: tested(model, size, ids) for name, ids in texts.test.items()}
        usage = spread_of(middle(model).mass)
    elif system.kind in ("peer", "pkm"):
        mass = GateMass(middle(model))
        losses = {name: tested(model, size, ids) for name, ids in texts.test.items()}
        usage = spread_of(mass.taken_off())
    else:
        losses = {name: tested(model, size, ids) for name, ids in texts.test.items()}
    return {"losses": losses, **usage, "cpu_seconds": seconds, "steps": steps, "operations": operations(system, size)}


class GateMass:
    """The gates that each expert of a layer gets in evaluation (He 2024, section 3.3: z)."""

    def __init__(self, layer: Any) -> None:
        self.sum = torch.zeros(layer.router.num_experts, dtype=torch.float64)
        self.handle = layer.router.register_forward_hook(self._note)

    def _note(self, router: Any, args: Any, routing: Any) -> None:
        self.sum.index_add_(0, routing.indices.flatten(), routing.weights.flatten().double())

    def taken_off(self) -> Tensor:
        self.handle.remove()
        return self.sum


def spread_of(mass: Tensor) -> dict[str, float]:
    """Usage: the share of experts with any mass; unevenness: log N + sum z log z, nats."""
    z = mass.double() / mass.sum()
    return {
        "usage": (z > 0).double().mean().item(),
        "unevenness": math.log(len(z)) + torch.xlogy(z, z).sum().item(),
    }


class Cells:
    """What was measured, by name, kept in a file so that a run that was cut off goes on."""

    def __init__(self, cache: Path | None) -> None:
        self.cache = cache
        self.found: dict[str, Any] = json.loads(cache.read_text()) if cache and cache.exists() else {}

    def take(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.found:
            started = time.time()
            self.found[key] = measure()
            print(f"{key}: {json.dumps(self.found[key])[:150]} ({time.time() - started:.0f} s)", flush=True)
            if self.cache:
                self.cache.write_text(json.dumps(self.found))
        return self.found[key]


def rates(cells: Cells, size: Size, texts: Texts, steps: int) -> dict[str, tuple[float, float]]:
    """The best learning rate of each kind, and what a table's is multiplied by, on a seed that is not reported."""
    chosen: dict[str, tuple[float, float]] = {}
    for system, tables in ((DENSE, (1.0,)), (COARSE, (1.0,)), (peer(128), TABLE_RATES)):
        losses: dict[tuple[float, float], float] = {}
        for rate in RATES:
            for table in tables:
                key = f"rate {system.name} {rate:g} x{table:g} at {steps}"
                losses[rate, table] = cells.take(key, partial(chosen_by, system, size, texts, steps, rate, table))
        chosen[system.kind] = min(losses, key=lambda pair: losses[pair])
    return {**chosen, "pkm": chosen["peer"]}


def chosen_by(system: System, size: Size, texts: Texts, steps: int, rate: float, table: float) -> float:
    return tested(trained(system, size, texts, TUNING_SEED, steps, rate, table), size, texts.choosing)


def run(cells: Cells, size: Size, texts: Texts, seeds: int, steps: int, given: tuple[System, ...]) -> dict[str, Any]:
    chosen = rates(cells, size, texts, steps)
    budgets = {system.name: round(steps * operations(system, size) / operations(DENSE, size)) for system in given}
    rows: dict[str, Any] = {}
    for seed in range(seeds):
        for system in given:
            key = f"{system.name} seed {seed} at {steps}"
            row = rows.setdefault(system.name, {"equal_steps": [], "dense_equal_flops": []})
            row["equal_steps"].append(
                cells.take(key, partial(measured, system, size, texts, seed, steps, *chosen[system.kind]))
            )
    for seed in range(seeds):
        for system in given:
            budget = max(steps, round(budgets[system.name] / steps * 20) * steps // 20)  # to 5 % of the steps
            key = f"dense seed {seed} at {budget}"
            found = cells.take(key, partial(measured, DENSE, size, texts, seed, budget, *chosen["dense"]))
            rows[system.name]["dense_equal_flops"].append(found)
    return {"rates": {kind: list(pair) for kind, pair in chosen.items()}, "systems": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/mixwright/peer_language.json")
    parser.add_argument("--only", nargs="*", help="systems whose names contain one of these")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="print the tables of an earlier run")
    given = parser.parse_args()
    if given.report:
        from benchmarks.peer_language_tables import tables

        print(tables(json.loads(RESULT.read_text())))
        return
    if not given.data.is_dir():
        raise SystemExit(f"{given.data} is not here; --data names the folder of WikiText-2's valid.txt and test.txt.")
    started = time.process_time()
    torch.set_num_threads(1)
    size = Size()
    texts = Texts(given.data, size, most=200_000 if given.quick else 4_000_000)
    chosen = tuple(s for s in systems() if not given.only or any(part in s.name for part in given.only))
    cache = None if given.quick else given.cache
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
    seeds, steps = (1, 6) if given.quick else (given.seeds, given.steps)
    found = run(Cells(cache), size, texts, seeds, steps, chosen)
    result = {**surroundings(started), "steps": steps, "seeds": seeds, "tokens": len(texts.train), **found}
    if not given.quick and not given.only:
        write_json(RESULT, result)


if __name__ == "__main__":
    main()
