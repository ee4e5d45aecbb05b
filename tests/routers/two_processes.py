"""Run by test_query_norm.py, once per process: gates and gradients of this process's share of the tokens."""

import sys
from pathlib import Path

import torch
from torch import distributed

from mixwright.routers.product_key import ProductKeyRouter
from mixwright.routing import Condition

SHARES = {"even": (5, 5), "uneven": (8, 2), "none": (10, 0), "one": (9, 1)}


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(1, 10, 6, generator=draw, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def made(norm: str) -> ProductKeyRouter:
    torch.manual_seed(1)
    router = ProductKeyRouter(6, (4, 4), 2, 3, 4, query_norm=norm)  # type: ignore[arg-type]
    return router.double()


def step(router: ProductKeyRouter, part: slice) -> dict[str, torch.Tensor]:
    x, ask = tokens()
    x = x[:, part].requires_grad_(True)
    queries = router.asked(x, Condition())
    out = router.find(queries).gates
    # every process's loss depends on its own tokens; the whole loss is the sum of them all
    ((out.sum((2, 3))[..., None] + queries.flatten(2).square().sum(-1, keepdim=True)) * ask[:, part]).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad, "mean": router.norm.mean, "var": router.norm.var}
    return found | {f"grad.{name}": p.grad for name, p in router.named_parameters() if p.grad is not None}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for norm in ("batch", "past_batch"):
        for name, share in SHARES.items():
            start = sum(share[:rank])
            found = step(made(norm), slice(start, start + share[rank]))
            torch.save(found, folder / f"{norm}-{name}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
