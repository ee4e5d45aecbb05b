"""The training of PHATGOOSE against its sheet: half strength, the gate's gradient, what changes and what does not."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.model import ComposedModel
from mixwright.data.batches import Batches, make_batches
from mixwright.data.tasks import Example, TextTask
from mixwright.methods.phatgoose.config import PhatgooseConfig
from mixwright.methods.phatgoose.expert import at_full_strength, new_expert, trained_expert, with_gates
from mixwright.methods.phatgoose.recipe import stages
from mixwright.ops.digest import tensor_digest
from mixwright.training.fit import fit
from mixwright.training.objectives import supervised
from mixwright.training.stage import Trained

CONFIG = PhatgooseConfig(rank=4, alpha=6.0, expert_steps=6, gate_steps=5, warmup=0.2)
TOKENS = torch.arange(4, 20)[None]


@pytest.fixture(scope="module")
def data() -> Batches:
    rows = tuple(Example(f"{c}:", target=c * 3) for c in "abcdefgh")
    return make_batches(TextTask("t", "prompt", rows), byte_tokenizer(), "causal", batch_size=4, seed=0, max_length=16)


def expert(seed: int = 0, strength: float = 0.3) -> Trained:
    """Factors that do something, on the tiny Llama."""
    draw = torch.Generator().manual_seed(seed)
    fresh = trained_expert(new_expert(tiny_backbone("llama"), CONFIG, seed), CONFIG.alpha / CONFIG.rank)
    made = {
        site: (
            strength * torch.randn(down.shape, generator=draw),
            strength * torch.randn(up.shape, generator=draw),
            scale,
        )
        for site, (down, up, scale) in fresh.factors.items()
    }
    return Trained(factors=made)


@pytest.fixture
def gated() -> Iterator[ComposedModel]:
    yield with_gates(at_full_strength(tiny_backbone("llama"), expert().factors))


def test_a_new_expert_is_drawn_as_published_and_changes_nothing() -> None:
    backbone = tiny_backbone("llama")
    with torch.no_grad():
        plain = backbone(TOKENS).logits
        model = new_expert(backbone, PhatgooseConfig(rank=64), seed=3)
        assert torch.equal(model(TOKENS).logits, plain)
    downs = torch.cat([factor[0].flatten() for factor in trained_expert(model).factors.values()])
    assert downs.std().item() == pytest.approx(0.01, rel=0.02) and abs(downs.mean().item()) < 2e-4
    assert all(not factor[1].any() and factor[2] == 1 / 64 for factor in trained_expert(model).factors.values())


def test_a_new_expert_adapts_every_linear_layer_of_every_block_and_nothing_else() -> None:
    t5 = new_expert(tiny_backbone("t5"), PhatgooseConfig(rank=2), seed=0)
    assert len(t5.mixtures) == 7 + 11  # the sheet's count for one encoder block and one decoder block
    assert not any("lm_head" in path or "shared" in path for path in t5.mixtures)


def test_factors_depend_on_the_seed_alone() -> None:
    one, same, other = (new_expert(tiny_backbone("llama"), CONFIG, seed) for seed in (1, 1, 2))
    site = "model.layers.0.mlp.up_proj"
    downs = [trained_expert(model).factors[site][0] for model in (one, same, other)]
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])


def test_at_a_zero_gate_every_site_has_exactly_half_of_the_expert(gated: ComposedModel) -> None:
    full = expert().factors
    draw = torch.Generator().manual_seed(5)
    for path, mixture in gated.mixtures.items():
        down, up, scale = full[path]
        x = torch.randn(2, 3, down.shape[1], generator=draw)
        contribution = mixture(x) - mixture.base(x)
        assert (contribution - 0.5 * scale * (x @ down.T @ up.T)).abs().max() <= 1e-6


def test_the_gate_starts_as_a_sum_of_its_inputs_weighed_by_usefulness(gated: ComposedModel) -> None:
    """dL/dv = 1/4 s sum_t <dL/dh_t, B A u_t> u_t at v = 0."""
    path = "model.layers.1.self_attn.v_proj"
    mixture = gated.mixtures[path]
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        del module
        kept["u"], kept["h"] = args[0].detach(), output
        output.retain_grad()

    with torch.enable_grad():
        mixture.register_forward_hook(keep)
        loss = nn.functional.cross_entropy(gated(TOKENS).logits[0, :-1], TOKENS[0, 1:])
        loss.backward()
    down, up, scale = expert().factors[path]
    useful = (kept["h"].grad * (kept["u"] @ down.T @ up.T)).sum(-1, keepdim=True)
    formula = 0.25 * scale * (useful * kept["u"]).sum((0, 1))
    gradient = mixture.router.get_parameter("gate").grad[0]
    assert formula.abs().max() > 1e-5
    assert (gradient - formula).abs().max() <= 1e-6 * max(1.0, formula.abs().max().item())


def test_gradients_of_gates_match_finite_differences() -> None:
    model = with_gates(at_full_strength(tiny_backbone("llama"), expert().factors)).double()
    gate = model.mixtures["model.layers.0.self_attn.q_proj"].router.get_parameter("gate")

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(TOKENS).logits[0, :-1], TOKENS[0, 1:])

    loss().backward()
    step = 1e-3  # the gate itself computes in float32
    for index in (0, 7, 31):
        values: list[float] = []
        for sign in (1, -1):
            with torch.no_grad():
                gate[0, index] += sign * step
                values.append(loss().item())
                gate[0, index] -= sign * step
        assert gate.grad[0, index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-6)


def test_stage_expert_changes_only_factors_and_stage_gate_only_gates(data: Batches) -> None:
    backbone = tiny_backbone("llama")
    before = tensor_digest(backbone)
    trained = None
    for stage, ending in zip(stages(CONFIG), ((".down", ".up"), (".gate",)), strict=True):
        model = stage.build(backbone, 0, trained)
        start = tensor_digest(model)
        fit(model, stage, data)
        changed = {name for name, digest in tensor_digest(model).items() if digest != start[name]}
        expected = {name for name in start if name.endswith(ending)}
        assert changed == expected, changed ^ expected
        trained = stage.harvest(model)
        model.remove()
    assert tensor_digest(backbone) == before
    assert trained.gates is not None and all(gate.abs().max() > 0 for gate in trained.gates.values())


def test_a_fixed_seed_gives_identical_gates(data: Batches) -> None:
    stage = stages(CONFIG)[1]
    runs: list[Trained] = []
    for seed in (3, 3, 4):
        model = stage.build(tiny_backbone("llama", attention_dropout=0.1), seed, expert())
        fit(model, stage, data, seed=seed)
        runs.append(stage.harvest(model))
    site = "model.layers.0.self_attn.q_proj"
    gates = [run.gates[site] for run in runs]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


def test_the_first_update_of_both_stages_has_rate_zero(data: Batches) -> None:
    for stage in stages(PhatgooseConfig(rank=2)):
        assert stage.rate(0) == 0.0 and stage.rate(stage.warmup_steps) == 1.0
    assert [stage.warmup_steps for stage in stages(PhatgooseConfig())] == [60, 6]
    one_step = stages(PhatgooseConfig(rank=2, expert_steps=1, warmup=1.0))[0]
    model = one_step.build(tiny_backbone("llama"), 0, None)
    start = tensor_digest(model)
    fit(model, one_step, data)
    assert tensor_digest(model) == start


def test_dropout_of_the_backbone_acts_while_training(data: Batches) -> None:
    seen: list[bool] = []

    def objective(model: nn.Module, batch: object) -> Tensor:
        seen.append(all(module.training for module in model.modules()))
        return supervised(model, batch)

    stage = stages(CONFIG)[0]
    model = stage.build(tiny_backbone("llama").eval(), 0, None)
    fit(model, replace(stage, objective=objective, steps=1), data)
    assert seen == [True] and not model.training


def test_the_paper_s_recipe_is_the_default() -> None:
    expert_stage, gate_stage = stages(PhatgooseConfig())
    assert [
        (s.name, s.steps, s.groups[0].lr, s.clip, s.optimizer, s.weight_decay) for s in (expert_stage, gate_stage)
    ] == [
        ("expert", 1000, 5e-3, 1.0, "adamw", 0.0),
        ("gate", 100, 5e-3, 1.0, "adamw", 0.0),
    ]
    assert (expert_stage.choose_every, gate_stage.choose_every) == (100, None)
