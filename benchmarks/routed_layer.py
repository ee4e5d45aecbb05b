"""One routed linear layer (2048 x 2048, rank 16, top 2, float32) against the bare layer, dense experts and PEFT.

    python -m benchmarks.routed_layer [--quick]

Everything alternates in one run. Bars: with 166 experts at most 1.30x the bare layer for 512 tokens and 1.6x for one;
added cost at least 5x below PEFT's Arrow with 36 experts and 512 tokens; peak extra memory at 512 tokens within 3x of
the two winners' own activations.
"""

import argparse
import time
from typing import Any

import torch
from torch import nn

from benchmarks.peft_layers import arrow, with_adapters, x_lora
from benchmarks.timing import alternate, machine, peak_bytes, show, summary, write
from mixwright.composition.mixture import Mixture
from mixwright.experts.lora import LoraExperts
from mixwright.ops.dispatch import lora_dense
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter

WIDTH, RANK, TOP_K = 2048, 16, 2
ARROW_LIMIT = 1 << 30
"""Arrow holds every expert's output: tokens x experts x width; beyond this many bytes it is left out."""
X_LORA_LIMIT = 166
"""X-LoRA runs adapter after adapter; with more than this many it takes minutes."""


def tensors(experts: int, tokens: int) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(experts * 1000 + tokens)
    x = torch.randn(1, tokens, WIDTH, generator=make)
    gates = torch.randn(experts, WIDTH, generator=make) * 0.1
    down = torch.randn(experts, RANK, WIDTH, generator=make) * WIDTH**-0.5
    up = torch.randn(experts, WIDTH, RANK, generator=make) * RANK**-0.5
    return x, gates, down, up


def measure(experts: int, tokens: int, *, rounds: int, cpu: bool = False) -> dict[str, Any]:
    """Times and memory of every contender for one pool and one number of tokens."""
    x, gates, down, up = tensors(experts, tokens)
    base = nn.Linear(WIDTH, WIDTH, bias=False)
    members = LoraExperts(down, up, torch.ones(experts), experts)
    mixture = Mixture(base, TokenRouter(PrototypeScores(gates), TOP_K), members).eval()
    with torch.inference_mode():
        routing = mixture.router(x, mixture.channel.condition)
        dense = routing.dense()
        runs: dict[str, Any] = {
            "bare layer": lambda: base(x),
            "mixwright": lambda: mixture(x),
            "all experts densely": lambda: base(x) + lora_dense(x, down, up, members.scale, dense),
        }
        left_out: dict[str, str] = {}
        _peft(runs, left_out, base, down, up, dense[0], x)
        _agree(runs, x)
        result = summary(alternate(runs, rounds=rounds, cpu=cpu), "bare layer")
        winners = 4 * tokens * TOP_K * (WIDTH + RANK)
        memory = {name: peak_bytes(run) for name, run in runs.items() if name in ("bare layer", "mixwright")}
    return {
        "experts": experts,
        "tokens": tokens,
        "times": result,
        "left_out": left_out,
        "memory": {
            **memory,
            "winners": winners,
            "extra_over_winners": (memory["mixwright"] - memory["bare layer"]) / winners,
        },
    }


def _peft(
    runs: dict[str, Any],
    left_out: dict[str, str],
    base: nn.Linear,
    down: torch.Tensor,
    up: torch.Tensor,
    dense: torch.Tensor,
    x: torch.Tensor,
) -> None:
    experts, tokens = down.shape[0], x.shape[1]
    try:
        import peft  # noqa: F401  (whether it is there)
    except ImportError:
        left_out["PEFT"] = "not installed (pip install peft)"
        return
    with torch.inference_mode(False), torch.no_grad():
        held = 4 * tokens * experts * WIDTH
        if held <= ARROW_LIMIT:
            routed = arrow(with_adapters(_twin(base), down, up, 1.0), experts, TOP_K)
            runs["PEFT Arrow"] = lambda: routed(x)
        else:
            left_out["PEFT Arrow"] = f"would hold {held / 2**30:.1f} GiB of outputs"
        if experts <= X_LORA_LIMIT:
            layer = x_lora(with_adapters(_twin(base), down, up, 1.0), experts, TOP_K, dense.clone())
            runs["PEFT X-LoRA"] = lambda: layer(x)
        else:
            left_out["PEFT X-LoRA"] = f"{experts} adapters one after another"


def _twin(base: nn.Linear) -> nn.Linear:
    """PEFT replaces the layer in its model, so it gets one of its own on the same weight."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    layer.weight = base.weight
    return layer


def _agree(runs: dict[str, Any], x: torch.Tensor) -> None:
    """The same tensors and the same winners give the same output, where the routing is the same (not Arrow's)."""
    expected = runs["all experts densely"]()
    for name in ("mixwright", "PEFT X-LoRA"):
        if name in runs:
            torch.testing.assert_close(runs[name](), expected, atol=2e-4, rtol=1e-4)


def verdict(cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar with what was measured, by medians and by the quickest runs."""
    by = {(case["experts"], case["tokens"]): case for case in cases}
    bars: dict[str, dict[str, Any]] = {}
    for tokens, limit in ((512, 1.30), (1, 1.6)):
        if (166, tokens) in by:
            row = by[166, tokens]["times"]["mixwright"]
            bars[f"E=166, {tokens} tokens: x bare layer, at most"] = {
                "bar": limit,
                "medians": row["ratio_of_medians"],
                "least": row["ratio_of_least"],
            }
    times = by[36, 512]["times"] if (36, 512) in by else {}
    if "PEFT Arrow" in times:
        ours, theirs = times["mixwright"], times["PEFT Arrow"]
        bars["E=36, 512 tokens: Arrow's added cost / ours, at least"] = {
            "bar": 5.0,
            "medians": theirs["added_ms"] / ours["added_ms"],
            "least": theirs["added_least_ms"] / ours["added_least_ms"],
        }
    for (experts, tokens), case in by.items():
        if tokens == 512:
            ratio = case["memory"]["extra_over_winners"]
            bars[f"E={experts}, 512 tokens: extra memory / winners' activations, at most"] = {
                "bar": 3.0,
                "measured": ratio,
            }
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and no pool of 1000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread, for a busy machine")
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--name", default="routed_layer", help="of the file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.process_time()
    cases = []
    for experts in given.experts or ((8, 36, 166) if given.quick else (8, 36, 166, 1000)):
        for tokens in (512, 1):
            rounds = given.rounds or (15 if given.quick else 60) * (1 if tokens > 1 else 5)
            case = measure(experts, tokens, rounds=rounds, cpu=given.cpu_time)
            show(f"{experts} experts, {tokens} tokens", case["times"], case["left_out"])
            cases.append(case)
    bars = verdict(cases)
    for bar, values in bars.items():
        print(bar, *(f"{key}={value:.2f}" for key, value in values.items()))
    path = write(
        given.name,
        {"clock": "processor" if given.cpu_time else "wall", "machine": machine(started), "cases": cases, "bars": bars},
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
