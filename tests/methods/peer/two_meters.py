"""Run in each of two processes: usage and rebalancing see the load of both. Writes what this one has."""

import sys

import torch
import torch.distributed as dist

from mixwright.evaluation.neuron_usage import usage
from mixwright.methods.peer.layer import PEER
from mixwright.methods.peer.rebalance import rebalancing


def observed(parts: list[int], folder: str = "", rank: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    peer = PEER(8, (5, 4), heads=2, top_k=3, dim_key=6, query_norm="none").eval()
    with usage(peer) as meter, rebalancing(peer, 0.1) as balancer:
        for part in parts:
            peer(torch.randn(4 + part, 8, generator=torch.Generator().manual_seed(part)))
        balancer.step()
    if folder:
        meter.add_processes()
    return {**meter.meter("layer").state_dict(), "bias": peer.router.bias_first.clone()}


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(observed([rank], folder, rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
