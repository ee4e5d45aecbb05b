"""What a PEER layer whose table is spread over processes sends: computed for every size, counted on real processes.

    python -m benchmarks.peer_wire
    python -m benchmarks.peer_wire --report    # the tables of the method's README, from the stored result

Counted are the values that `torch.distributed` is given for other processes, by four processes (gloo) with a table of
2^14 and one of 2^18 experts, forward and backward; they must be those of `ops.wire.wire_bytes`, byte for byte. The
tables are for 128 experts of a token, width 1024, bfloat16 inputs and eight processes, by that formula.
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.record import surroundings, write_json
from mixwright.evaluation.table import markdown
from mixwright.experts.sharding import shard
from mixwright.experts.table import NeuronTable
from mixwright.ops.wire import wire_bytes

RESULT = Path(__file__).parent / "results" / "peer_wire.json"
WAYS = ("columns", "rows", "unpooled")
SIZES = (14, 17, 20, 24, 27, 30, 32)
LAYER = {"width": 1024, "k": 128, "parts": 2, "processes": 8}
COUNTED = {"width": 64, "k": 32, "parts": 2, "processes": 4}
TOKENS = 32


def counting(rank: int, port: int, target: str) -> None:
    """One of the counting processes; the first writes what all have sent."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    world = COUNTED["processes"]
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sent, plain = torch.zeros(1, dtype=torch.int64), dist.all_to_all_single

    def all_to_all(out: Tensor, given: Tensor, receive: list[int], send: list[int], group: Any) -> Any:
        sent.add_((given.numel() - send[rank]) * given.element_size())
        return plain(out, given, receive, send, group=group)

    dist.all_to_all_single = all_to_all
    found: dict[str, list[int]] = {}
    for size in (14, 18):
        for by in ("columns", "rows"):
            torch.manual_seed(0)
            whole = torch.randn(1 << size, COUNTED["parts"], COUNTED["width"])
            table = shard(NeuronTable(whole), by=by)
            x = torch.randn(TOKENS, COUNTED["width"]).bfloat16().requires_grad_()
            indices = torch.randint(1 << size, (TOKENS, COUNTED["k"]))
            weights = torch.rand(TOKENS, COUNTED["k"]).requires_grad_()
            table.local.gradient = "compact"
            passes = []
            out = table(x, weights, indices, "gelu")
            passes.append(sent.clone())
            out.float().sum().backward()
            passes.append(sent - passes[0])
            sent.zero_()
            for each in passes:
                dist.all_reduce(each)
            counts = 8 * world * (world - 1)  # how many tokens each brings
            found[f"{by} 2^{size}"] = [int(passes[0]) - counts, int(passes[1])]
    if rank == 0:
        Path(target).write_text(json.dumps(found))
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    """Bytes of a token, counted and computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = RESULT.with_suffix(".part")
    mp.spawn(counting, (port, str(target)), nprocs=COUNTED["processes"])
    counted = json.loads(target.read_text())
    target.unlink()
    rows: dict[str, Any] = {}
    for name, passes in counted.items():
        by, size = name.split(" 2^")
        computed = [
            sum(wire_bytes(by, num_experts=1 << int(size), **COUNTED, backward=back).values())  # type: ignore[arg-type]
            for back in (False, True)
        ]
        tokens = TOKENS * COUNTED["processes"]
        rows[name] = {"counted": [sent / tokens for sent in passes], "computed": computed}
        assert rows[name]["counted"] == computed, name
    return rows


def computed() -> dict[str, Any]:
    """Bytes of a token by the formula, as the table grows."""
    return {
        f"2^{size}": {
            by: [
                sum(wire_bytes(by, num_experts=1 << size, **LAYER, backward=back).values())  # type: ignore[arg-type]
                for back in (False, True)
            ]
            for by in WAYS
        }
        for size in SIZES
    }


def report(result: dict[str, Any]) -> None:
    """Two tables: as N grows, and what the bytes are."""
    width = LAYER["width"] * LAYER["parts"] * 2
    rows = [
        [f"2^{size}", f"{width << size >> 30} GiB" if size > 17 else f"{width << size >> 20} MiB"]
        + [f"{result['computed'][f'2^{size}'][by][way] / 1024:,.1f}" for way in (0, 1) for by in WAYS]
        for size in SIZES
    ]
    print(
        markdown(["N", "table, bf16", *(f"{by}, {way} (KiB)" for way in ("forward", "backward") for by in WAYS)], rows)
    )
    print()
    parts = {by: wire_bytes(by, num_experts=1 << 20, **LAYER) for by in WAYS}  # type: ignore[arg-type]
    names = list(dict.fromkeys(name for found in parts.values() for name in found))
    print(
        markdown(["", *WAYS], [[n, *(f"{parts[by][n]:,.0f}" if n in parts[by] else "" for by in WAYS)] for n in names])
    )
    print()
    for name, found in result["counted"].items():
        print(
            f"counted, {name}: {found['counted']} bytes of a token, forward and backward; computed {found['computed']}"
        )


def main() -> None:
    """Count, compute, write; or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print the stored result")
    if not parser.parse_args().report:
        started = time.process_time()
        result = {"counted": measure(), "computed": computed(), "layer": LAYER, "counted_layer": COUNTED}
        write_json(RESULT, {**surroundings(started), **result})
    report(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
