"""What a hybrid costs is counted, and what is counted agrees with formulas and with what runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.evaluation.decode_state import decode_state
from mixwright.evaluation.operations import counted
from mixwright.evaluation.verdict import EQUAL_FLOPS, EQUAL_TOKENS
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.controls import AS_IT_CAME, budgets, size_of
from mixwright.methods.manticore.cost import cost, flops_by_slot, projector_parameters
from mixwright.methods.manticore.model import HybridModel

DEEP = {"num_hidden_layers": 4}


@pytest.fixture
def model() -> HybridModel:
    built = [tiny_backbone("gpt_neox", **DEEP), tiny_backbone("mamba2", **DEEP, hidden_size=48, num_heads=12)]
    return mw.compose("manticore", backbones=built, num_blocks=2)  # type: ignore[return-value]


def test_parameters_are_the_formula_and_what_is_there(model: HybridModel) -> None:
    found = cost(model)
    assert found.projector_parameters == projector_parameters((32, 48), 2)
    components = sum(p.numel() for part in model.components for p in part.parameters())
    added = sum(p.numel() for slot, m in model.mixtures.items() if "blocks" in slot for p in m.experts.parameters())
    assert found.parameters == components + added
    assert found.parameters == components + found.projector_parameters


def test_operations_of_a_transformer_are_the_textbooks(model: HybridModel) -> None:
    tokens, width, feed = 64, 32, 48
    neox: Any = model.components[0]
    sections = {
        neox.gpt_neox.layers[0]: "layers",
        neox.embed_out if hasattr(neox, "embed_out") else neox.lm_head: "head",
    }
    with counted(sections, "embedding") as seen:
        neox(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    per_layer = 2 * (4 * width**2 + 2 * width * feed) + 2 * 2 * tokens * width
    assert seen.products["layers"] == tokens * 4 * per_layer
    assert seen.products["head"] == tokens * 2 * width * 264
    assert 0 < seen.elementwise["layers"] < seen.products["layers"]


def test_a_hybrid_computes_what_its_parts_and_projectors_do(model: HybridModel) -> None:
    """Products of one pass of the whole: the components' own, and two per number of each projector's matrices."""
    inputs = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    with counted({}) as whole:
        model(**inputs)
    alone = 0
    for part in model.components:
        with counted({}) as seen:
            part(**inputs)
        alone += seen.products[""]
    found = cost(model)
    assert whole.products[""] == alone + 64 * found.projector_flops


def test_what_does_not_act_costs_nothing_to_run(model: HybridModel) -> None:
    both = cost(model)
    model.mixture_weights = ((1.0, 0.0), (1.0, 0.0))
    one = cost(model)
    assert one.flops_per_token == sum(one.components[0].flops.values()) < both.flops_per_token
    assert one.state_bytes(100) == one.components[0].state_bytes(100) < both.state_bytes(100)
    assert "mamba2: " in one.text()
    assert "acts nowhere" in one.text()
    assert one.plain()["components"]["mamba2"]["acts"] is False


def test_a_path_of_layers_costs_what_is_left_of_it(model: HybridModel) -> None:
    """Pruned, a discretised hybrid computes what acts in it, and no more."""
    soft = cost(model)
    assert soft.pruned_flops == soft.flops_per_token
    model.mixture_weights = ((1.0, 0.0), (0.0, 1.0))
    path = cost(model)
    assert path.pruned_flops < path.flops_per_token < soft.flops_per_token
    small = model.pruned()
    with counted({}) as seen:
        small(input_ids=torch.zeros(1, 64, dtype=torch.long))
    computed = (seen.products.total() + seen.elementwise.total()) / 64
    assert path.pruned_flops == pytest.approx(computed, rel=0.02)
    assert cost(small).flops_per_token == pytest.approx(path.pruned_flops, rel=0.02)


def test_equal_flops_are_steps_of_what_each_computes(model: HybridModel) -> None:
    config = ManticoreConfig(tune_steps=300, discretise_steps=100, controls="flops")
    alone, hybrid = (size_of(part, 64) for part in (model.components[0], model))
    found = cost(model)
    assert hybrid.run_flops == found.flops_per_token and hybrid.flops == found.pruned_flops
    assert alone.flops == alone.run_flops == sum(found.components[0].flops.values())
    steps = budgets(config, 400 * hybrid.run_flops, alone.flops)
    assert steps == {AS_IT_CAME: 0, EQUAL_TOKENS: 400, EQUAL_FLOPS: round(400 * hybrid.run_flops / alone.flops)}
    assert steps[EQUAL_FLOPS] > 800  # a Mamba-2 of the same depth, without kernels, computes more than the NeoX
    assert budgets(replace(config, controls="none"), 1.0, 1.0) == {AS_IT_CAME: 0}


def test_flops_by_block_split_a_component(model: HybridModel) -> None:
    table = flops_by_slot(model).blocks()
    assert table.shape == (2, 2)
    assert table[0, 0] == pytest.approx(float(table[1, 0]), rel=0.05)
    assert (table > 0).all()


@pytest.mark.parametrize("family", ["gpt_neox", "mamba2", "mistral", "gpt2"])
@pytest.mark.parametrize("tokens", [5, 11])
def test_the_state_is_what_the_cache_holds(family: str, tokens: int) -> None:
    model = tiny_backbone(family)
    found = decode_state(model)
    with torch.no_grad():
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True)
    cache = out.get("past_key_values") if out.get("past_key_values") is not None else out.get("cache_params")
    held = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            tensors = value.values() if isinstance(value, dict) else [value]
            held += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    assert sum(layer.bytes(tokens) for layer in found) == held
    if family == "mamba2":
        assert all(layer.per_token == 0 < layer.constant for layer in found)
    if family == "mistral":
        assert {layer.window for layer in found} == {64}
        assert found[0].bytes(1000) == found[0].bytes(64)


def test_the_peak_is_what_a_pass_holds() -> None:
    with counted({}) as seen:
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
        torch.ones(10)
    assert seen.peak == 8000


def test_nothing_is_changed_by_counting(model: HybridModel) -> None:
    inputs = example_inputs(model.components[0], 5)
    assert inputs is not None
    with torch.no_grad():
        before = model(**inputs).logits
    assert "parameters" in cost(model).text()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
