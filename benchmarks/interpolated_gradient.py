"""The gradient of interpolated weights: a step's time and peak memory against autograd's own form of the formula.

    python -m benchmarks.interpolated_gradient [--quick] [--sizes tiny,small] [--threads 1]

A ViT of the size named (random weights, 128 px: 65 tokens), 8 experts with a mask per weight, and one gradient step:
merge, forward and backward of 8 images, gradients of the shared change, all logits and the routing weights. Everything
alternates in one run. Contenders: `mixwright`, its compiled passes where they are built; `torch alone`, the same
without them; `autograd`, theta + (sum_m alpha_m z_m) delta as one writes it down; `bare`, the backbone's own gradients
with no experts (what full meta-tuning has). Two more take the four episodes of an update: `mixwright` merges their
weights in one pass over the masks, `autograd` takes one after another and adds up. Memory is what torch holds at most
during the step beyond the backbone's parameters: the pool's parameters, their gradients, activations and all else.
`merge` is a new support set's weights
without gradients, beside a forward pass of 25 images: from logits, by a byte for each weight where masks are 0 or 1,
and `switch`, copying weights that were merged before into the backbone and taking them back.

Bars: `mixwright` at most half of `autograd`'s memory, and no slower; with one episode and with four.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

from benchmarks.kernel_setting import kernels_set
from benchmarks.timing import alternate, machine, peak_bytes, show, summary, write
from mixwright.composition.rollback import Rollback
from mixwright.experts.maskable import maskable
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.known_gradient import promise
from mixwright.ops.hard_concrete import BETA, GAMMA, ZETA
from mixwright.routing import Routing

EXPERTS, IMAGES, SUPPORT = 8, 8, 25
SIZES = {"tiny": (192, 3), "small": (384, 6)}
OURS, ALONE, AUTOGRAD, BARE = "mixwright", "torch alone", "autograd", "bare"
FOUR, OURS_FOUR, AUTOGRAD_FOUR = 4, "mixwright, four episodes", "autograd, four episodes"
FORWARD = f"forward of {SUPPORT} images"


class Pool:
    """A backbone of one size and its pool, with masks as sparse as trained ones and a change that is not zero."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        width, heads = SIZES[size]
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width, "image_size": 128}
        self.backbone: nn.Module = ViTModel(ViTConfig(**sizes), add_pooling_layer=False).eval()
        self.theta = {name: tensor.detach() for name, tensor in self.backbone.named_parameters()}
        self.deltas = SparseDeltas(maskable(self.backbone), EXPERTS)
        with torch.no_grad():
            for delta in self.deltas.delta.values():
                delta.normal_(std=1e-3)
            for logits in self.deltas.logits.values():
                logits.normal_(mean=-2.5, std=1.0)
        self.weights = torch.softmax(torch.randn(EXPERTS), 0).requires_grad_()
        self.images = torch.randn(IMAGES, 3, 128, 128)
        self.support = torch.randn(SUPPORT, 3, 128, 128)

    def loss(self, theta: dict[str, Tensor]) -> Tensor:
        found = functional_call(self.backbone, theta, (self.images,)).last_hidden_state[:, 0]
        return cross_entropy(found[:, :IMAGES], torch.arange(IMAGES))

    def forget(self) -> None:
        for parameter in (*self.deltas.parameters(), self.weights):
            parameter.grad = None

    def ours(self) -> None:
        self.forget()
        self.loss(self.deltas.onto(self.theta, Routing(self.weights, EXPERTS))).backward()

    def ours_four(self) -> None:
        """As `EpisodeLoss.together` does it: one graph of activations at a time."""
        self.forget()
        routings = [Routing(self.weights.roll(turn), EXPERTS) for turn in range(FOUR)]
        thetas = self.deltas.onto_each(self.theta, routings)
        link, gradients = promise([tensor for theta in thetas for tensor in theta.values()])
        leaves = [{name: tensor.detach().requires_grad_() for name, tensor in theta.items()} for theta in thetas]
        del thetas
        for _ in routings:
            theta = leaves.pop(0)
            gradients += torch.autograd.grad(self.loss(theta), list(theta.values()))
        link.backward()

    def autograd_four(self) -> None:
        self.forget()
        for turn in range(FOUR):
            self.loss(self.written_down(self.weights.roll(turn))).backward()

    def alone(self) -> None:
        with kernels_set("off"):
            self.ours()

    def autograd(self) -> None:
        self.forget()
        self.loss(self.written_down()).backward()

    def written_down(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The formula as one writes it."""
        weights = self.weights if weights is None else weights
        found: dict[str, Tensor] = {}
        for name in self.deltas.names:
            delta, logits = (part[name.replace(".", "/")] for part in (self.deltas.delta, self.deltas.logits))
            masks = (torch.sigmoid(logits / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
            found[name] = self.theta[name] + torch.einsum("m,m...->...", weights, masks) * delta
        return found

    def bare(self) -> None:
        self.forget()
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.theta.items()}
        self.loss(leaves).backward()

    @torch.no_grad()
    def merged(self, deltas: SparseDeltas | None = None) -> dict[str, Tensor]:
        return (deltas or self.deltas).onto(self.theta, Routing(self.weights, EXPERTS))

    def switching(self) -> Callable[[], None]:
        merged, rollback = self.merged(), Rollback(self.backbone)

        def switch() -> None:
            rollback.apply(merged)
            rollback.undo()

        return switch

    @torch.no_grad()
    def merged_plainly(self) -> dict[str, Tensor]:
        return self.written_down()

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.backbone(self.support).last_hidden_state


def check(pool: Pool) -> None:
    """All forms give the same gradients."""
    _agree(pool, pool.ours, pool.alone, pool.autograd)
    _agree(pool, pool.ours_four, pool.autograd_four)


def _agree(pool: Pool, *runs: Callable[[], None]) -> None:
    found = []
    for run in runs:
        run()
        found.append([p.grad.clone() for p in (*pool.deltas.delta.values(), pool.weights) if p.grad is not None])
    largest = max(float(grad.abs().max()) for grad in found[-1][:-1])  # keys' biases have none but for rounding
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-4 * largest)


def measured(size: str, rounds: int, cpu: bool) -> dict[str, object]:
    pool = Pool(size)
    check(pool)
    pool.forget()
    held = sum(p.numel() * p.element_size() for p in pool.deltas.parameters())
    runs = {OURS: pool.ours, ALONE: pool.alone, AUTOGRAD: pool.autograd, BARE: pool.bare}
    runs |= {OURS_FOUR: pool.ours_four, AUTOGRAD_FOUR: pool.autograd_four}
    memory = {}
    for name, run in runs.items():
        memory[name] = peak_bytes(_forgotten(pool, run)) + (0 if name == BARE else held)
    step = summary(alternate(runs, rounds=rounds, slow=60.0, cpu=cpu), AUTOGRAD)
    pool.forget()
    pool.deltas.eval()
    whole = copy.deepcopy(pool.deltas)
    whole.binarise()
    merges = {
        "merge": pool.merged, "merge, masks of 0 and 1": lambda: pool.merged(whole), "switch": pool.switching(),
        "merge, torch alone": _alone(pool.merged), "merge, autograd's form": pool.merged_plainly,
        FORWARD: pool.forward,
    }  # fmt: skip
    merge = summary(alternate(merges, rounds=rounds, slow=60.0, cpu=cpu), FORWARD)
    show(f"ViT-{size}: a gradient step of {IMAGES} images", step)
    show(f"ViT-{size}: the weights of a new support set", merge)
    shares = {n: value / memory[AUTOGRAD_FOUR if "four" in n else AUTOGRAD] for n, value in memory.items()}
    for name, value in memory.items():
        print(f"{name}: {value / 2**20:.0f} MiB beyond the backbone, {shares[name]:.2f} of autograd's")
    return {
        "weights": pool.deltas.num_weights,
        "pool_bytes": held,
        "peak_bytes": memory,
        "peak_of_autograds": shares,
        "step": step,
        "merge": merge,
        "bars": {
            "memory at most half": shares[OURS] <= 0.5,
            "no slower": step[OURS]["ratio_of_medians"] <= 1.0,
            "four episodes: memory at most half": shares[OURS_FOUR] <= 0.5,
            "four episodes: no slower": step[OURS_FOUR]["ratio_of_medians"] <= step[AUTOGRAD_FOUR]["ratio_of_medians"],
        },
    }


def _forgotten(pool: Pool, run: Callable[[], None]) -> Callable[[], None]:
    """A run whose gradients are its own: none are held before it."""

    def fresh() -> None:
        run()
        pool.forget()

    return fresh


def _alone(run: Callable[[], object]) -> Callable[[], object]:
    def alone() -> object:
        with kernels_set("off"):
            return run()

    return alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of ViT-tiny; writes nothing")
    parser.add_argument("--sizes", default="tiny,small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true")
    given = parser.parse_args()
    started = time.process_time()
    torch.set_num_threads(given.threads)
    if given.quick:
        measured("tiny", 3, given.cpu_time)
        return
    seconds = "CPU time of this process" if given.cpu_time else "wall clock"
    sizes: dict[str, object] = {}
    for size in given.sizes.split(","):
        sizes[size] = measured(size, given.rounds, given.cpu_time)
        write("interpolated_gradient", {"sizes": sizes, "seconds": seconds, **machine(started)})


if __name__ == "__main__":
    main()
