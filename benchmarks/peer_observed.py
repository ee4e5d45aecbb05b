"""What a PEER layer that watches itself gains: unsure retrieval, adaptive k, rebalancing, revival of dead sub-keys.

A tiny causal character model (a window of 16 characters, one PEER layer) is trained here on Tiny Shakespeare, three
seeds; its first 90 % train, half of the rest calibrates, the other half is what every loss is of.

python -m benchmarks.peer_observed --data tinyshakespeare/input.txt
python -m benchmarks.peer_observed --report
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.record import surroundings, write_json
from mixwright.evaluation.neuron_usage import SiteUsage, usage
from mixwright.evaluation.selective import risk_coverage
from mixwright.evaluation.table import markdown
from mixwright.experts.dense_branch import DenseNeurons
from mixwright.experts.table import initial_rows
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.rebalance import Rebalancer
from mixwright.methods.peer.revival import Admission, revive
from mixwright.methods.peer.unsure import (
    coverage_thresholds,
    flag_unsure,
    lean_unsure,
    retrieve_adaptively,
    retrieve_plainly,
    widen_unsure,
)
from mixwright.routing import Condition

RESULTS = Path(__file__).parent / "results" / "peer_observed.json"
WINDOW, WIDTH, GRID, HEADS, K, BATCH = 16, 64, (64, 64), 4, 8, 256
SITE = "layer"


class Characters(nn.Module):
    """logits = W norm(h + PEER(norm(h))), h = W' (embeddings of the last 16 characters)."""

    def __init__(self, vocabulary: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 24)
        self.mix = nn.Linear(24 * WINDOW, WIDTH)
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.layer = PEER(WIDTH, GRID, heads=HEADS, top_k=K, dim_key=64, **options)
        self.logits = nn.Linear(WIDTH, vocabulary)

    def forward(self, windows: Tensor) -> Tensor:
        h = self.mix(self.embed(windows).flatten(-2))
        return self.logits(self.after(h + self.layer(self.before(h))))


class Text:
    """Windows of characters and what comes next, by part."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
        self.vocabulary = len(letters)
        ids = torch.tensor([letters[letter] for letter in text])
        cuts = [int(share * len(ids)) for share in (0.0, 0.9, 0.95, 1.0)]
        self.parts = [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    def training(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        part = self.parts[0]
        while True:
            at = torch.randint(len(part) - WINDOW, (BATCH,), generator=generator)
            yield self._at(part, at)

    def held_out(self, part: int, tokens: int = 6144) -> list[tuple[Tensor, Tensor]]:
        """The same tokens every time, all over the part, in batches."""
        ids = self.parts[part]
        at = torch.linspace(0, len(ids) - WINDOW - 1, tokens).long()
        return [self._at(ids, piece) for piece in at.split(2048)]

    def _at(self, ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return ids[at[:, None] + torch.arange(WINDOW)], ids[at + WINDOW]


def train(
    model: Any,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    after: Callable[[], object] | None = None,
    only: nn.Module | None = None,
) -> Any:
    """AdamW with a linear decay; `only`: the part that is trained; `after`: called after each step."""
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(only is None)
    if only is not None:
        model.eval()
        only.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        windows, wanted = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(windows), wanted).backward()
        optimizer.step()
        if after is not None:
            after()
    return model.requires_grad_(True).eval()


@torch.no_grad()
def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nats of every token."""
    model.eval()
    return torch.cat([cross_entropy(model(windows), wanted, reduction="none") for windows, wanted in data])


@torch.no_grad()
def measured(model: Characters, data: list[tuple[Tensor, Tensor]]) -> tuple[float, SiteUsage]:
    """The loss, and what was used for it."""
    with usage(model) as meter:
        loss = float(losses(model, data).mean())
    return loss, meter[SITE]


def numbers(loss: float, used: SiteUsage) -> dict[str, float]:
    """What is kept of a measurement."""
    return {
        "loss": loss,
        "unevenness": used.unevenness,
        "rows_used": used.used,
        "dead_rows": len(used.dead) / len(used.counts),
        "dead_sub_keys": float(torch.cat([used.first.dead, used.second.dead]).mean()),
        "coverage": float(used.coverage.mean()) if used.coverage is not None else float("nan"),
        "rows_per_token": int(used.counts.sum()) / used.tokens,
    }


def measures(model: Any, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Coverage, margin, and minus the entropy of each token, means over heads: confidences."""
    seen: dict[str, list[Tensor]] = {}

    class Recorder:
        detail = True

        def __call__(self, found: Any, counted: Any) -> None:
            for name, sign in (("coverage", 1), ("margin", 1), ("entropy", -1)):
                seen.setdefault(name, []).append(sign * getattr(found, name).flatten(0, -2).mean(-1))

    recorder = Recorder()
    model.layer.router.observers.append(recorder)
    losses(model, data)
    model.layer.router.observers.remove(recorder)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def unsure(model: Characters, text: Text, seed: int, further: int) -> dict[str, Any]:
    """Thresholds from one half of what was held out, everything else on the other."""
    calibration, data = text.held_out(1), text.held_out(2)
    retrieve_plainly(model)
    plain = losses(model, data)
    found: dict[str, Any] = {
        "risk_coverage": {
            name: risk_coverage(plain, confidence).risks for name, confidence in measures(model, data).items()
        }
    }
    shuffled = torch.rand(len(plain), generator=torch.Generator().manual_seed(seed))
    found["risk_coverage"]["random"] = risk_coverage(plain, shuffled).risks
    limits = coverage_thresholds(model, [windows for windows, _ in calibration], 0.2)
    flag_unsure(model, limits)
    with usage(model) as meter:
        losses(model, data)
    flags = [model.layer.router.retrieve(_inside(model, windows), Condition()).flagged for windows, _ in data]
    flagged = torch.cat([one.flatten(0, -2).any(-1) for one in flags if one is not None])
    share = meter[SITE].flagged
    assert share is not None
    found["flagged"] = {"heads": float(share.mean()), "tokens": float(flagged.float().mean())}

    def note(name: str, changed: Characters) -> None:
        with usage(changed, detail=False) as meter:
            now = losses(changed, data)
        used = meter[SITE]
        found.setdefault("fallbacks", {})[name] = {
            "loss": float(now.mean()),
            "flagged_loss": float(now[flagged].mean()),
            "other_loss": float(now[~flagged].mean()),
            "rows_per_token": int(used.counts.sum()) / used.tokens,
            "dense_weight": used.leaning or 0.0,
        }

    retrieve_plainly(model)
    note("plain", model)
    for wider in (2 * K, 3 * K, 4 * K):
        widen_unsure(model, limits, wider)
        note(f"widen to {wider}", model)
    retrieve_plainly(model)
    everywhere = deepcopy(model)
    everywhere.layer.router.top_k = 2 * K
    note(f"every head {2 * K}", everywhere)
    tuned = deepcopy(model)
    note(f"plain, {further} steps more", train(tuned, text.training(seed + 100), further))
    tuned = deepcopy(model)
    widen_unsure(tuned, limits, 2 * K)
    note(f"widen to {2 * K}, {further} steps more", train(tuned, text.training(seed + 100), further))
    for name, at in (("flagged heads", limits), ("every head", {SITE: torch.full((HEADS,), 2.0)})):
        tuned = deepcopy(model)
        draw = torch.Generator().manual_seed(seed)
        dense = DenseNeurons(initial_rows(64, 2, WIDTH, 0.0, draw))
        lean_unsure(tuned, at, {SITE: dense})
        train(tuned, text.training(seed + 100), further, only=dense)
        note(f"dense branch for {name}, {further} steps for it alone", tuned)
    return found


@torch.no_grad()
def _inside(model: Characters, windows: Tensor) -> Tensor:
    return model.before(model.mix(model.embed(windows).flatten(-2)))


def adaptive(model: Characters, text: Text) -> list[dict[str, float]]:
    """Adaptive k against fixed k at equal mean k: the share is found on the one half, the losses are of the other."""
    calibration, data = text.held_out(1), text.held_out(2)
    rows: list[dict[str, float]] = []
    for k in (2, 4, 8, 12, 16):
        retrieve_plainly(model)
        before, model.layer.router.top_k = model.layer.router.top_k, k
        fixed, used = measured(model, data)
        model.layer.router.top_k = before
        wanted = _share_for(model, calibration, k)
        retrieve_adaptively(model, wanted, 4 * k)
        loss, adapted = measured(model, data)
        retrieve_plainly(model)
        rows.append(
            {
                "k": k,
                "fixed_loss": fixed,
                "adaptive_loss": loss,
                "share": wanted,
                "mean_k": int(adapted.counts.sum()) / adapted.tokens / HEADS,
                "fixed_coverage": float(used.coverage.mean()) if used.coverage is not None else 0.0,
                "adaptive_coverage": float(adapted.coverage.mean()) if adapted.coverage is not None else 0.0,
            }
        )
    return rows


def _share_for(model: Characters, data: list[tuple[Tensor, Tensor]], k: int) -> float:
    """The share at which adaptive retrieval takes k experts per head in the mean, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        retrieve_adaptively(model, middle, 4 * k)
        with usage(model, detail=False) as meter, torch.no_grad():
            for windows, _ in data[::2]:
                model(windows)
        mean = int(meter[SITE].counts.sum()) / meter[SITE].tokens / HEADS
        low, high = (low, middle) if mean > k else (middle, high)
    return (low + high) / 2


def trained(text: Text, seed: int, steps: int, norm: str, rate: float = 0.0) -> Characters:
    """A model, rebalanced after every step at this rate; sub-keys per head where queries are not normalised."""
    torch.manual_seed(seed)
    model = Characters(text.vocabulary, query_norm=norm, share_keys=norm == "batch")
    balancer = Rebalancer(model, rate) if rate else None
    train(model, text.training(seed), steps, after=balancer.step if balancer else None)
    if balancer:
        balancer.detach()
    return model


def revival(model: Characters, text: Text, seed: int, further: int) -> dict[str, dict[str, float]]:
    """What `model` becomes by more training, with its dead sub-keys revived and without."""
    data, stream = text.held_out(2), text.held_out(1)
    found = {"before": numbers(*measured(model, data))}
    found["trained on"] = numbers(*measured(train(deepcopy(model), text.training(seed + 100), further), data))
    with usage(model) as meter:
        held = losses(model, stream)
    plain = losses(model, data)
    what = revive(model, [windows for windows, _ in stream], meter.usage(), losses=[held], seed=seed)
    same = losses(model, stream)
    found["revived"] = numbers(*measured(model, data)) | {
        "sub_keys": what.count(),
        "rows": sum(map(len, what.rows.values())),
        "moved_on_the_stream": float((same != held).float().mean()),
        "moved_elsewhere": float((losses(model, data) != plain).float().mean()),
    }
    admission = Admission(model, what, steps=further // 2)
    train(model, text.training(seed + 100), further, after=admission.step)
    found["revived and trained on"] = numbers(*measured(model, data))
    return found


class Faint(nn.Module):
    """A PEER layer that tells twelve directions apart, seen clearly or faintly: where being unsure is in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = PEER(16, (12, 12), heads=2, top_k=4, dim_key=16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def faint_batch(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    directions = 2 * torch.randn(12, 16, generator=torch.Generator().manual_seed(7))
    wanted = torch.randint(12, (count,), generator=generator)
    clear = torch.rand(count, 1, generator=generator)
    return clear * directions[wanted] + 0.5 * torch.randn(count, 16, generator=generator), wanted


def faint(seed: int, steps: int = 120) -> dict[str, Any]:
    """Risk-coverage and fallbacks where low coverage means a faint input."""
    torch.manual_seed(seed)
    batches = (faint_batch(1000 * seed + step, 256) for step in range(100, 10**6))
    model = train(Faint(), batches, steps)
    data = [faint_batch(1, 8192)]
    plain = losses(model, data)
    found: dict[str, Any] = {
        "risk_coverage": {name: risk_coverage(plain, sure).risks for name, sure in measures(model, data).items()}
    }
    limits = coverage_thresholds(model, [faint_batch(2, 8192)[0]], 0.2)
    flag_unsure(model, limits)
    flags = model.layer.router.retrieve(data[0][0][None], Condition()).flagged
    assert flags is not None
    flagged = flags[0].any(-1)
    found["flagged"] = {"heads": float(flags.float().mean()), "tokens": float(flagged.float().mean())}
    for name, put in (
        ("plain", lambda: retrieve_plainly(model)),
        ("widen to 8", lambda: widen_unsure(model, limits, 8)),
        ("widen to 16", lambda: widen_unsure(model, limits, 16)),
    ):
        put()
        now = losses(model, data)
        found.setdefault("fallbacks", {})[name] = [float(part.mean()) for part in (now, now[flagged], now[~flagged])]
    for name, at in (("flagged heads", limits), ("every head", {SITE: torch.full((2,), 2.0)})):
        tuned = deepcopy(model)
        dense = DenseNeurons(initial_rows(64, 2, 16, 0.0, torch.Generator().manual_seed(seed)))
        lean_unsure(tuned, at, {SITE: dense})
        now = losses(train(tuned, batches, steps, only=dense), data)
        parts = [float(part.mean()) for part in (now, now[flagged], now[~flagged])]
        found["fallbacks"][f"dense branch for {name}, trained alone"] = parts
    return found


def one_seed(text: Text, seed: int, steps: int, further: int) -> dict[str, Any]:
    """Everything, from one seed."""
    normed, bare = (trained(text, seed, steps, norm) for norm in ("batch", "none"))
    models = {"batch norm": normed, "batch norm, rate 0.001": trained(text, seed, steps, "batch", 0.001), "none": bare}
    models |= {f"none, rate {rate}": trained(text, seed, steps, "none", rate) for rate in (0.001, 0.01)}
    balance = {name: numbers(*measured(model, text.held_out(2))) for name, model in models.items()}
    return {
        "seed": seed,
        "unsure": unsure(normed, text, seed, further),
        "adaptive": adaptive(normed, text),
        "rebalancing": balance,
        "revival": revival(bare, text, seed, further),
    }


def faint_report(seeds: list[dict[str, Any]]) -> str:
    """The toy's two tables."""
    kept = [f"{10 * tenth} %" for tenth in range(10, 0, -1)]
    rows = [
        [name, *(f"{statistics.fmean(s['risk_coverage'][name][i] for s in seeds):.3f}" for i in range(10))]
        for name in seeds[0]["risk_coverage"]
    ]
    shares = ", ".join(f"{what} {mean([s['flagged'][what] for s in seeds])}" for what in ("heads", "tokens"))
    losses_of = [
        [name, *(mean([s["fallbacks"][name][i] for s in seeds]) for i in range(3))] for name in seeds[0]["fallbacks"]
    ]
    return "\n\n".join(
        [
            f"**Faint inputs**, flagged: {shares}",
            markdown(["loss of the surest by", *kept], rows),
            markdown(["fallback", "loss", "of flagged tokens", "of others"], losses_of),
        ]
    )


def mean(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} +- {spread:.{digits}f}"


def report(seeds: list[dict[str, Any]]) -> str:
    """Everything as Markdown tables: mean and standard deviation over seeds, and how many seeds agree."""
    first = seeds[0]
    parts = [
        "**Unsure retrieval**: "
        + ", ".join(
            f"{what} flagged {mean([s['unsure']['flagged'][what] for s in seeds])}" for what in ("heads", "tokens")
        )
    ]
    rows = []
    for name in first["unsure"]["fallbacks"]:
        cells = [[s["unsure"]["fallbacks"][name][key] for s in seeds] for key in first["unsure"]["fallbacks"][name]]
        rows.append([name, *(mean(cell) for cell in cells)])
    parts.append(markdown(["fallback", "loss", "of flagged tokens", "of others", "rows/token", "dense weight"], rows))
    kept = ("100 %", "90 %", "80 %", "70 %", "60 %", "50 %", "40 %", "30 %", "20 %", "10 %")
    rows = [
        [name, *(f"{statistics.fmean(s['unsure']['risk_coverage'][name][i] for s in seeds):.3f}" for i in range(10))]
        for name in first["unsure"]["risk_coverage"]
    ]
    parts.append(markdown(["loss of the surest by", *kept], rows))
    rows = []
    for i, row in enumerate(first["adaptive"]):
        gaps = [s["adaptive"][i]["adaptive_loss"] - s["adaptive"][i]["fixed_loss"] for s in seeds]
        means = (mean([s["adaptive"][i][key] for s in seeds]) for key in ("mean_k", "fixed_loss", "adaptive_loss"))
        rows.append([str(row["k"]), *means, f"{mean(gaps, 4)} ({sum(gap < 0 for gap in gaps)} of {len(gaps)} lower)"])
    parts.append(markdown(["k", "mean adaptive k", "fixed", "adaptive", "difference"], rows))
    for part in ("rebalancing", "revival"):
        keys = ("loss", "unevenness", "rows_used", "dead_rows", "dead_sub_keys")
        rows = [[name, *(mean([s[part][name][key] for s in seeds]) for key in keys)] for name in first[part]]
        parts.append(markdown([part, "loss", "unevenness", "rows used", "dead rows", "dead sub-keys"], rows))
    extra = ("sub_keys", "rows", "moved_on_the_stream", "moved_elsewhere")
    parts.append(
        "Revived: " + ", ".join(f"{key} {mean([s['revival']['revived'][key] for s in seeds])}" for key in extra)
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--further", type=int, default=200)
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables of what is stored")
    given = parser.parse_args()
    if given.report:
        stored = json.loads(RESULTS.read_text())
        print(report(stored["seeds"]), faint_report(stored["faint"]), sep="\n\n")
        return
    torch.set_num_threads(1)
    started, text = time.process_time(), Text(given.data)
    seeds = []
    clear = [faint(seed) for seed in range(given.seeds)]
    for seed in range(given.seeds):
        seeds.append(one_seed(text, seed, given.steps, given.further))
        print(f"seed {seed}: {time.process_time() - started:.0f} s", flush=True)
        described = surroundings(started)
        options = f"--seeds {len(seeds)} --steps {given.steps} --further {given.further}"
        described["command"] = f"python -m benchmarks.peer_observed --data input.txt {options}"
        write_json(RESULTS, {**described, "seeds": seeds, "faint": clear})
    print(report(seeds), faint_report(clear), sep="\n\n")


if __name__ == "__main__":
    main()
