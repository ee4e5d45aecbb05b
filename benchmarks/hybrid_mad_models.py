"""What is compared on MAD: small models from scratch, and hybrids of them, all trained in one and the same way."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import mixwright as mw
from mixwright.backbones.hf import build_backbone
from mixwright.data.collate import IGNORED
from mixwright.data.mad_tasks import MadExamples, MadTask

ATTENTION, STATE_SPACE = 0, 1
WARM_UP, COOL_DOWN = 25, 0.25
WEIGHTS_RATE = 0.1  # of mixture logits and of the ensemble's weights; the paper's 0.01 to 0.05 are for longer runs


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the models and their batches; `layers` of NeoX, Mamba-2 has twice as many.

    `initial`: spread of NeoX's initial weights, `initial_in_hybrid` of those that start in a soft hybrid. Mamba-2 has
    its own, 0.1, everywhere.
    """

    width: int = 48
    heads: int = 4
    layers: int = 2
    state: int = 16
    chunk: int = 16
    initial: float = 0.1
    initial_in_hybrid: float = 0.02
    batch: int = 32
    steps: int = 300
    validation: int = 512
    test: int = 1024


class Ensemble(nn.Module):
    """softmax(w)-weighted logits of models that share nothing."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.logits = nn.Parameter(torch.zeros(len(members)))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        outs = [member(input_ids=input_ids, use_cache=use_cache) for member in self.members]
        mixed = torch.einsum("m,mbtv->btv", self.logits.softmax(-1), torch.stack([out.logits for out in outs]))
        outs[0].logits = mixed
        return outs[0]


def neox(
    size: Size, vocab_size: int, length: int, seed: int, depth: int = 1, initial: float | None = None
) -> nn.Module:
    """A GPT-NeoX. By default a quarter of a head's 12 dimensions turns with the place: too few to know places by."""
    settings = {
        "vocab_size": vocab_size, "hidden_size": size.width, "intermediate_size": 4 * size.width,
        "num_hidden_layers": depth * size.layers, "num_attention_heads": size.heads,
        "max_position_embeddings": length, "use_parallel_residual": False, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        "initializer_range": size.initial if initial is None else initial,
    }  # fmt: skip
    return build_backbone("gpt_neox", settings, kind="causal", seed=seed)


def mamba2(size: Size, vocab_size: int, length: int, seed: int, depth: int = 1) -> nn.Module:
    """A Mamba-2. Its default chunk of 256 would pad every sequence."""
    settings = {
        "vocab_size": vocab_size, "hidden_size": size.width, "num_hidden_layers": 2 * depth * size.layers,
        "state_size": size.state, "expand": 2, "num_heads": 2, "head_dim": size.width, "n_groups": 1,
        "chunk_size": min(size.chunk, length), "tie_word_embeddings": False,
    }  # fmt: skip
    return build_backbone("mamba2", settings, kind="causal", seed=seed)


def hybrid(models: Sequence[nn.Module], num_blocks: int, search: bool = False) -> nn.Module:
    """A hybrid of NeoX and Mamba-2; without `search` its mixture weights stay what they are.

    Embedding and head have block 0's weights, as in the paper. Projectors start at the identity: from the framework's
    initial values everything is learned later (in-context recall, 300 steps, seed 0: .41 against .75 at 5e-3, but .39
    against .34 at 2e-3).
    """
    made = mw.compose("manticore", backbones=list(models), num_blocks=num_blocks, rows="block", projectors="identity")
    return _learning(made, search)


def path(models: Sequence[nn.Module], owners: Sequence[int]) -> nn.Module:
    """Block k is a run of layers of the model `owners[k]` and nothing else, the head that of the last."""
    weights = [[float(owner == model) for model in range(len(models))] for owner in owners]
    made = mw.compose("manticore", backbones=list(models), num_blocks=len(owners), mixture_weights=weights)
    return _learning(made, False)


def _learning(made: Any, search: bool) -> nn.Module:
    made.requires_grad_(True)
    for mixture in made.mixtures.values():
        mixture.router.logits.requires_grad_(search)
    return made


ARMS = (
    "NeoX", "Mamba-2", "NeoX, twice as deep", "Mamba-2, twice as deep", "logit ensemble",
    "hybrid K=1", "hybrid K=2", "hybrid K=2, uniform", "SSM then attention",
)  # fmt: skip
REFERENCE = "hybrid K=2"  # whose steps are FLOPs for all


def make(arm: str, size: Size, task: MadTask, seed: int) -> nn.Module:
    """A fresh model of an arm; the components of a path and of the ensemble start as they do alone."""
    vocab, length = task.vocab_size, task.length
    initial = size.initial_in_hybrid if arm.startswith("hybrid") else size.initial
    pair = [neox(size, vocab, length, seed, initial=initial), mamba2(size, vocab, length, seed)]
    match arm:
        case "NeoX" | "Mamba-2":
            return pair[ATTENTION if arm == "NeoX" else STATE_SPACE]
        case "NeoX, twice as deep":
            return neox(size, vocab, length, seed, depth=2)
        case "Mamba-2, twice as deep":
            return mamba2(size, vocab, length, seed, depth=2)
        case "logit ensemble":
            return Ensemble(pair)
        case "hybrid K=1" | "hybrid K=2":
            return hybrid(pair, int(arm[-1]), search=True)
        case "hybrid K=2, uniform":
            return hybrid(pair, 2)
        case "SSM then attention":
            return path(pair, [STATE_SPACE, ATTENTION])
        case _:
            raise ValueError(f"no arm {arm!r}; there are {', '.join(ARMS)}.")


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Of the scored positions."""
    return cross_entropy(model(input_ids=tokens, use_cache=False).logits.flatten(0, 1), targets.flatten())


def operations(model: nn.Module, tokens: Tensor, targets: Tensor) -> int:
    """Floating-point operations of one training step: three times the products of a forward pass, as torch counts them.

    Those of the backward pass are not counted themselves: torch takes a depthwise convolution's for a dense one's.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss_of(model, tokens, targets)
    return 3 * counter.get_total_flops()


def parameters(model: nn.Module) -> int:
    """Those that a pass reads: a path leaves the others out."""
    model.zero_grad()
    tokens = torch.zeros(1, 2, dtype=torch.long)
    loss_of(model.train(), tokens, tokens).backward()
    count = sum(p.numel() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return count


@dataclass(slots=True)
class Optimiser:
    """AdamW over the weights, clipped at norm 1, and over mixture logits apart: not clipped, a peak of their own."""

    model: nn.Module
    rate: float
    optimiser: torch.optim.AdamW = field(init=False)
    weights: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        logits = [p for name, p in named if name.endswith("logits")]
        self.weights = [p for name, p in named if not name.endswith("logits")]
        groups = [{"params": self.weights, "peak": self.rate}, {"params": logits, "peak": WEIGHTS_RATE}]
        self.optimiser = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )

    def step(self, loss: Tensor, share: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


def trained(model: nn.Module, examples: MadExamples, size: Size, rate: float, horizons: Sequence[int]) -> Iterator[int]:
    """Train for each of the `horizons`, rising; the model is that of a horizon while it is yielded.

    A constant rate after a warm-up, and a linear cool-down to 0 over the last quarter of each horizon. The shorter runs
    are branches of the longest: up to the cool-down they are the same run.
    """
    optimiser, done = Optimiser(model, rate), 0
    for horizon in horizons:
        bend = horizon - int(COOL_DOWN * horizon)
        done = _steps(model, optimiser, examples, size, range(done, bend), horizon)
        kept = None
        if horizon != horizons[-1]:
            kept = copy.deepcopy((model.state_dict(), optimiser.optimiser.state_dict()))
        _steps(model, optimiser, examples, size, range(bend, horizon), horizon)
        yield horizon
        if kept is not None:
            model.load_state_dict(kept[0])
            optimiser.optimiser.load_state_dict(kept[1])


def _steps(
    model: nn.Module, optimiser: Optimiser, examples: MadExamples, size: Size, steps: range, horizon: int
) -> int:
    model.train()
    cool = int(COOL_DOWN * horizon)
    for step in steps:
        part = slice(step * size.batch, (step + 1) * size.batch)
        share = min(1.0, (step + 1) / WARM_UP, (horizon - step) / cool)
        optimiser.step(loss_of(model, examples.tokens[part], examples.targets[part]), share)
    return steps.stop


@torch.no_grad()
def scores(model: nn.Module, examples: MadExamples) -> Mapping[str, float]:
    """Accuracy and loss on the scored positions."""
    model.eval()
    right = total = 0
    loss = 0.0
    for at in range(0, len(examples), 128):
        tokens, targets = examples.tokens[at : at + 128], examples.targets[at : at + 128]
        logits = model(input_ids=tokens, use_cache=False).logits
        scored = targets != IGNORED
        loss += float(cross_entropy(logits[scored], targets[scored], reduction="sum"))
        right += int((logits.argmax(-1) == targets)[scored].sum())
        total += int(scored.sum())
    return {"accuracy": right / total, "loss": loss / total}
