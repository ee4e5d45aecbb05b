"""A hybrid of a GPT-NeoX and a Mamba-2 against the sum of what the two cost alone: forward, training step, decoding.

    python -m benchmarks.hybrid_speed [--quick] [--cpu-time] [--widths 128 512] [--blocks 1 4] [--again]
    python -m benchmarks.hybrid_speed --size 125m --device cuda --dtype bfloat16    # a pair of 125 M parameters
    python -m benchmarks.hybrid_speed --phases decode --cpu-time --rounds 9 --name hybrid_decode_speed
    python -m benchmarks.hybrid_speed --report       # the table of the method's README, from the stored result

Random weights, Mamba-2 with twice the layers, mixture weights of one half at every slot, linear projectors. `both` runs
one component after the other; `one-hot` hybrids follow one component at every slot. All contenders of a case alternate
in one run. `forward` is 8 x 128 tokens without gradients (`prefill`: with a cache, of the 125 M pair), `step` is
forward, loss and backward of as many with all gradients, `decode` the next 16 tokens one by one, batch 1: the prompt is
read before the clock starts, and each run goes on where its last one stopped.

Bars: a hybrid at most 1.10x both, a one-hot hybrid at most 1.05x the component alone.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.record import write_json
from benchmarks.timing import RESULTS, alternate, machine

NEOX, MAMBA, BOTH, SOFT = "GPT-NeoX", "Mamba-2", "both", "hybrid"
PAIRS = ((SOFT, BOTH, 1.10), (f"one-hot {NEOX}", NEOX, 1.05), (f"one-hot {MAMBA}", MAMBA, 1.05))
ROUNDS, QUICK_ROUNDS = 25, 7
Runs = Mapping[str, Callable[[], object]]


def components(size: int | str, layers: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The two models; `size` is a width, or 125m."""
    from mixwright.backbones.hf import build_backbone

    large = size == "125m"
    width, layers, vocab = (768, 12, 50_280) if large else (int(size), layers, 2_048)
    state, head = (128, 64) if large else (16, 32)
    special = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    neox = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    mamba = {"hidden_size": width, "num_hidden_layers": 2 * layers, "state_size": state, "head_dim": head, "expand": 2}
    built = (
        build_backbone("gpt_neox", {**special, **neox, "num_attention_heads": width // head}, seed=0),
        build_backbone("mamba2", {**special, **mamba, "num_heads": 2 * width // head, "n_groups": 1}, seed=1),
    )
    return tuple(model.to(device, dtype) for model in built)  # type: ignore[return-value]


def contenders(pair: tuple[nn.Module, nn.Module], blocks: int) -> dict[str, tuple[nn.Module, ...]]:
    """Name -> the models that are run for it, one after another."""
    import mixwright as mw

    anchor = next(pair[0].parameters())
    models: dict[str, tuple[nn.Module, ...]] = {NEOX: pair[:1], MAMBA: pair[1:], BOTH: pair}
    rows = {SOFT: [0.5, 0.5], f"one-hot {NEOX}": [1.0, 0.0], f"one-hot {MAMBA}": [0.0, 1.0]}
    for name, row in rows.items():
        model = mw.compose("manticore", backbones=list(pair), num_blocks=blocks, names=[NEOX, MAMBA])
        model.to(anchor.device, anchor.dtype).eval()
        model.mixture_weights = [row] * blocks
        models[name] = (model,)
    for model in pair:
        model.requires_grad_(True)
    return models


def forward(models: tuple[nn.Module, ...], ids: Tensor, use_cache: bool) -> Callable[[], object]:
    def run() -> None:
        with torch.inference_mode():
            for model in models:
                model(input_ids=ids, use_cache=use_cache)

    return run


def step(models: tuple[nn.Module, ...], ids: Tensor) -> Callable[[], object]:
    def run() -> None:
        for model in models:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

    return run


def decode(models: tuple[nn.Module, ...], ids: Tensor, steps: int = 16) -> Callable[[], object]:
    with torch.inference_mode():
        last = [model(input_ids=ids[:1, :8], use_cache=True, logits_to_keep=1) for model in models]

    def run() -> None:
        with torch.inference_mode():
            for number, model in enumerate(models):
                out = last[number]
                name = "cache_params" if "cache_params" in out else "past_key_values"
                for _ in range(steps):
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(input_ids=token, use_cache=True, **{name: out[name]})
                last[number] = out

    return run


def timed(runs: Runs, rounds: int, cpu: bool, device: str) -> dict[str, list[float]]:
    """Median and least milliseconds, and the number of runs."""

    def waited(run: Callable[[], object]) -> Callable[[], object]:
        def whole() -> None:
            run()
            torch.cuda.synchronize()

        return whole

    if device == "cuda":
        runs = {name: waited(run) for name, run in runs.items()}
    seconds = alternate(runs, rounds=rounds, slow=float("inf"), cpu=cpu)
    return {name: [1e3 * statistics.median(s), 1e3 * min(s), len(s)] for name, s in seconds.items()}


def ratios(times: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """What hybrids take of what they are compared with: by the medians, by the quickest runs."""
    return {name: [times[name][i] / times[base][i] for i in (0, 1)] for name, base, _ in PAIRS}


def measure(pair: tuple[nn.Module, nn.Module], blocks: int, given: argparse.Namespace) -> dict[str, Any]:
    models, large = contenders(pair, blocks), given.size is not None
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 2_048, (8, 512 if large else 128), generator=draw).to(given.device)
    first = "prefill" if large else "forward"
    made: dict[str, Callable[[tuple[nn.Module, ...]], Callable[[], object]]] = {
        first: lambda of: forward(of, ids, large),
        "step": lambda of: step(of, ids),
        "decode": lambda of: decode(of, ids),
    }
    result: dict[str, Any] = {}
    for phase, make in made.items():
        if given.phases and phase not in given.phases:
            continue
        times = timed({name: make(of) for name, of in models.items()}, given.rounds, given.cpu_time, given.device)
        result[phase] = {"ms": times, "ratios": ratios(times)}
    return result


def bars(cases: Mapping[str, Any]) -> dict[str, Any]:
    """The largest ratio (by the quickest runs) of each kind, and whether its bar holds."""
    found: dict[str, Any] = {}
    for name, base, bar in PAIRS:
        every = [phase["ratios"][name] for case in cases.values() for phase in case.values()]
        worst = [max(values) for values in zip(*every)]
        found[f"{name} / {base}"] = {"bar": bar, "worst": worst, "holds": worst[1] <= bar}
    return found


def report(stored: Mapping[str, Any]) -> str:
    """Ratios by the quickest runs, and by the medians in brackets."""
    cases = stored["cases"]
    if not cases:
        return "nothing is stored yet; measure first."
    phases = list(next(iter(cases.values())))
    lines = ["| case | " + " | ".join(f"{phase}, {name}" for phase in phases for name, _, _ in PAIRS) + " |"]
    lines.append("|---" * (1 + len(phases) * len(PAIRS)) + "|")
    for case, result in cases.items():
        cells = [result[phase]["ratios"][name] for phase in phases for name, _, _ in PAIRS]
        lines.append(f"| {case} | " + " | ".join(f"{least:.2f} ({median:.2f})" for median, least in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--phases", nargs="+", help="of forward (prefill), step, decode; all of them if not given")
    parser.add_argument("--layers", type=int, default=6, help="of the GPT-NeoX")
    parser.add_argument("--size", choices=("125m",), help="a pair of this size instead of the widths")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--again", action="store_true", help="what is stored already too")
    parser.add_argument("--name", default="hybrid_speed", help="of the file in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the table of what is stored")
    given = parser.parse_args()
    given.rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    path = RESULTS / f"{given.name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    if given.report:
        print(report(stored))
        return
    torch.set_num_threads(1)
    started = time.process_time()
    for size in [given.size] if given.size else given.widths:
        pair = components(size, given.layers, given.device, getattr(torch, given.dtype))
        for blocks in given.blocks:
            case = f"{size}, K = {blocks}" + (f", {given.device} {given.dtype}" if given.device != "cpu" else "")
            if case in stored["cases"] and not given.again:
                continue
            stored["cases"][case] = measure(pair, blocks, given)
            stored |= {"clock": "processor" if given.cpu_time else "wall", "layers": given.layers}
            stored |= {"machine": machine(started), "bars": bars(stored["cases"])}
            write_json(path, stored)
            print(report({"cases": {case: stored["cases"][case]}}), flush=True)
    print(json.dumps(stored["bars"], indent=1))


if __name__ == "__main__":
    main()
