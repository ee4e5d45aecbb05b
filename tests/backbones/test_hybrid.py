"""A hybrid is faithful: one-hot weights give a component's own logits, and nothing of a pass stays behind."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.backbones.hybrid import HybridBackbone

IDS = torch.randint(4, 264, (2, 9), generator=torch.Generator().manual_seed(0))
HALF = [0.5, 0.5]
A, B = [1.0, 0.0], [0.0, 1.0]


def hooks(hybrid: HybridBackbone) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in hybrid.components.modules())


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("families", "blocks"),
    [
        (("gpt_neox", "mamba2"), 1), (("gpt_neox", "mamba2"), 2), (("opt", "gemma3"), 2), (("jamba", "bloom"), 2),
        (("gpt2", "recurrent_gemma", "falcon"), 2), (("mixtral", "rwkv"), 2),
    ],
)  # fmt: skip
@torch.no_grad()
def test_one_hot_is_the_component_itself(families: tuple[str, ...], blocks: int, tiny: Any, hybrid_of: Any) -> None:
    components = [tiny(family, i) for i, family in enumerate(families)]
    for m, component in enumerate(components):
        row = [float(i == m) for i in range(len(components))]
        hybrid = hybrid_of(components, [row] * (blocks + 2))
        assert torch.equal(hybrid(IDS).logits, component(IDS).logits)
        assert torch.equal(hybrid(IDS, logits_to_keep=2).logits, component(IDS).logits[:, -2:])


@torch.no_grad()
def test_widths_and_depths_may_differ(tiny: Any, hybrid_of: Any) -> None:
    wide = tiny("llama", hidden_size=48, num_hidden_layers=5)
    components = [wide, tiny("mamba2", 1, num_hidden_layers=3), tiny("gpt2", 2, n_embd=64, n_layer=4)]
    for m, component in enumerate(components):
        hybrid = hybrid_of(components, [[float(i == m) for i in range(3)]] * 5)
        assert hybrid.runs[0] == (range(2), range(2, 3), range(3, 5))
        assert torch.equal(hybrid(IDS).logits, component(IDS).logits)
    with pytest.raises(ValueError, match="num_blocks=4: expected 1 to 3"):
        hybrid_of(components, [[1.0, 0.0, 0.0]] * 6)


def test_by_itself_a_hybrid_follows_its_first_component(tiny: Any) -> None:
    components = [tiny("gpt_neox"), tiny("mamba2", 1)]
    hybrid = HybridBackbone(components, 2, ("a", "b")).eval()
    assert torch.equal(hybrid(IDS).logits, components[0](IDS).logits)


def test_a_splice_is_the_model_with_its_layers_changed(tiny: Any, hybrid_of: Any) -> None:
    a, b = tiny("llama", 0, num_hidden_layers=4), tiny("llama", 1, num_hidden_layers=4)
    expected = copy.deepcopy(a)
    for i in (2, 3):
        expected.model.layers[i] = copy.deepcopy(b.model.layers[i])
    expected.model.norm, expected.lm_head = copy.deepcopy(b.model.norm), copy.deepcopy(b.lm_head)
    hybrid = hybrid_of([a, b], [A, A, B, B])
    found = hybrid(IDS, labels=IDS)
    wanted = expected(IDS, labels=IDS)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)
    found.loss.backward()
    wanted.loss.backward()
    touched = {name.split(".", 2)[2] for name in gradients(hybrid) if name.startswith("components.0")}
    assert touched == {
        n for n, _ in a.named_parameters() if n.startswith(("model.embed", "model.layers.0", "model.layers.1"))
    }
    touched = {name.split(".", 2)[2] for name in gradients(hybrid) if name.startswith("components.1")}
    assert touched == {
        n for n, _ in b.named_parameters() if n.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_"))
    }
    theirs = gradients(expected)
    for name, grad in gradients(hybrid).items():
        torch.testing.assert_close(grad, theirs[name.split(".", 2)[2]])


def test_a_component_without_weight_is_never_run(tiny: Any, hybrid_of: Any) -> None:
    a, b = tiny("gpt_neox"), tiny("mamba2", 1)
    hybrid = hybrid_of([a, b], [A] * 4)
    b.forward = None  # whoever calls it fails
    out = hybrid(IDS, use_cache=True)
    assert list(out.past_key_values.native) == [0]
    out.logits.sum().backward()
    assert not gradients(b)


@pytest.mark.parametrize("rows", [[A, A, B, B], [B, B, A, A], [A, B, A, B], [HALF, A, HALF, B]])
@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("gemma3", "jamba")])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(families: Any, rows: Any, tiny: Any, hybrid_of: Any) -> None:
    settings = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window": 4,
    }
    first = tiny(families[0], 0, **(settings if families[0] == "gemma3" else {}))
    hybrid = hybrid_of([first, tiny(families[1], 1)], rows)
    whole = hybrid(IDS).logits
    out = hybrid(IDS[:, :4], use_cache=True)
    steps = [out.logits]
    for piece in (IDS[:, 4:5], IDS[:, 5:6], IDS[:, 6:7], IDS[:, 7:8], IDS[:, 8:9]):
        out = hybrid(piece, past_key_values=out.past_key_values)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert out.past_key_values.get_seq_length() == 9


def test_gradients_reach_everything_that_acts(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("mamba2", 1)], [HALF] * 4)
    hybrid(IDS, labels=IDS).loss.backward()
    assert {n for n, p in hybrid.named_parameters() if p.requires_grad} == set(gradients(hybrid))


class Broken(Exception):
    pass


@pytest.mark.parametrize("coroutines", ["greenlet", "thread"])
@pytest.mark.parametrize("where", ["first", "last", "between"])
def test_nothing_stays_behind_after_an_error(where: str, coroutines: str, tiny: Any, hybrid_of: Any) -> None:
    a, b = tiny("gpt_neox"), tiny("mamba2", 1)
    before = [component(IDS).logits for component in (a, b)]
    hybrid = hybrid_of([a, b], [HALF] * 4, coroutines=coroutines)
    expected = hybrid(IDS).logits
    assert hooks(hybrid) == 0

    def fail(*_: Any) -> None:
        raise Broken

    place = {"first": b.backbone.layers[0], "last": a.lm_head, "between": hybrid.blocks[1]}[where]
    handle = place.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        hybrid(IDS)
    handle.remove()
    assert hooks(hybrid) == 0
    assert all(slot.current is None for slot in hybrid.slots)
    assert torch.equal(hybrid(IDS).logits, expected)
    for component, logits in zip((a, b), before):
        assert torch.equal(component(IDS).logits, logits)


def test_threads_give_what_greenlets_give(tiny: Any, hybrid_of: Any) -> None:
    found = []
    for coroutines in ("greenlet", "thread"):
        hybrid = hybrid_of([tiny("gpt2"), tiny("mamba2", 1)], [HALF, HALF, B, HALF], coroutines=coroutines).train()
        for component in hybrid.components:
            component.eval()
        out = hybrid(IDS, labels=IDS)
        out.loss.backward()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            half = hybrid(IDS).logits
        found.append((out.logits, half, gradients(hybrid)))
    (logits, half, grads), (other, other_half, others) = found
    assert torch.equal(logits, other)
    assert torch.equal(half, other_half)
    assert not torch.equal(half, logits), "autocast did not reach the components"
    assert grads.keys() == others.keys()
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


@pytest.mark.parametrize("families", [("gpt2", "mamba2"), ("opt", "jamba"), ("gpt_neox", "bloom")])
@torch.no_grad()
def test_left_padding_changes_nothing(families: Any, tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny(family, i) for i, family in enumerate(families)], [HALF] * 4)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1).clone()
    mask[1, 3:5] = 0
    out = hybrid(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = hybrid(padded[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits
    torch.testing.assert_close(out.logits[0, 3:], hybrid(IDS[:1, :-1]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits[1, 5:], hybrid(IDS[1:, 2:-1]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last[0], hybrid(IDS[:1]).logits[0, -1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last[1], hybrid(IDS[1:, 2:]).logits[0, -1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hybrid(padded, attention_mask=mask).logits[:, -1:], last, rtol=1e-4, atol=1e-5)


def test_components_of_different_types_of_numbers(tiny: Any, hybrid_of: Any) -> None:
    components = [tiny("gpt_neox").to(torch.bfloat16), tiny("mamba2", 1), tiny("gpt2", 2).double()]
    for m, component in enumerate(components):
        hybrid = hybrid_of(components, [[float(i == m) for i in range(3)]] * 4)
        with torch.no_grad():
            assert torch.equal(hybrid(IDS).logits, component(IDS).logits)
    hybrid = hybrid_of(components, [[0.25, 0.25, 0.5]] * 4)
    hybrid(IDS, labels=IDS).loss.backward()
    assert {n for n, p in hybrid.named_parameters() if p.requires_grad} == set(gradients(hybrid))


@torch.no_grad()
def test_rows_beyond_the_common_vocabulary_never_win(tiny: Any, hybrid_of: Any) -> None:
    a, b = tiny("gpt_neox", vocab_size=280), tiny("mamba2", 1)
    a.lm_head.weight[264:] += 100 * a.lm_head.weight[:264].abs().max()
    hybrid = hybrid_of([a, b], [A] * 4)
    assert hybrid.vocab_size == hybrid.config.vocab_size == 264
    assert torch.equal(hybrid(IDS).logits, a(IDS).logits[..., :264])
    shorter = hybrid_of([a, b], [HALF] * 4, vocab_size=260)
    assert shorter(IDS).logits.shape == (2, 9, 260)
    assert hybrid_of([a, b], [HALF] * 4, vocab_size=999).vocab_size == 264


def test_checkpointing_changes_no_gradient(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("mamba2", 1)], [HALF, HALF, B, HALF]).train()
    hybrid(IDS, labels=IDS).loss.backward()
    plain = {name: grad.clone() for name, grad in gradients(hybrid).items()}
    hybrid.zero_grad()
    ran: list[int] = []
    for component, norm in zip(hybrid.components, ("gpt_neox.layers.0.input_layernorm", "backbone.layers.1.norm")):
        component.get_submodule(norm).register_forward_hook(lambda *_: ran.append(1))
    hybrid.gradient_checkpointing_enable()
    hybrid(IDS, labels=IDS).loss.backward()
    assert len(ran) == 4, "no layer was run again"
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients(hybrid).items())
    hybrid.gradient_checkpointing_disable()
    hybrid(IDS, labels=IDS).loss.backward()
    assert len(ran) == 6


def test_it_runs_under_compile(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox", num_hidden_layers=1), tiny("llama", 1, num_hidden_layers=1)], [HALF] * 3)
    with torch.no_grad():
        expected = hybrid(IDS).logits
        torch.testing.assert_close(torch.compile(hybrid, backend="eager")(IDS).logits, expected)
    torch._dynamo.reset()
    assert hooks(hybrid) == 0


@torch.no_grad()
def test_one_module_may_be_two_components(tiny: Any, hybrid_of: Any) -> None:
    model = tiny("gpt_neox")
    expected = model(IDS).logits
    torch.testing.assert_close(hybrid_of([model, model], [HALF] * 4)(IDS).logits, expected)


@torch.no_grad()
def test_a_copy_is_a_hybrid_of_its_own(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("mamba2", 1)], [HALF] * 4)
    expected = hybrid(IDS).logits
    other = copy.deepcopy(hybrid)
    assert torch.equal(other(IDS).logits, expected)
    for parameter in other.components.parameters():
        parameter.zero_()
    assert torch.equal(hybrid(IDS).logits, expected)
    assert not torch.equal(other(IDS).logits, expected)


def test_what_a_hybrid_does_not_take_is_refused(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("rwkv", 1)], [HALF] * 4)
    with pytest.raises(ValueError, match="expected input_ids alone"):
        hybrid(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(TypeError, match="takes no 'token_type_ids'"):
        hybrid(IDS, token_type_ids=IDS)
    with pytest.raises(ValueError, match="output_attentions"):
        hybrid(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="keeps no cache"):
        hybrid(IDS, use_cache=True)
    assert hooks(hybrid) == 0


def test_its_config_holds_for_every_component(tiny: Any, hybrid_of: Any) -> None:
    a = tiny("gpt_neox", max_position_embeddings=128, eos_token_id=[1, 3])
    hybrid = hybrid_of([tiny("mamba2", 1), a, tiny("gpt2", 2)], [[0.0, 0.5, 0.5]] * 3)
    assert hybrid.config.max_position_embeddings == 128
    assert (hybrid.config.vocab_size, hybrid.config.hidden_size) == (264, 32)
    assert (hybrid.generation_config.eos_token_id, hybrid.generation_config.pad_token_id) == (1, 0)
    assert (hybrid.device.type, hybrid.dtype) == ("cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_components_may_be_on_different_devices(tiny: Any, hybrid_of: Any) -> None:
    a, b = tiny("gpt_neox"), tiny("mamba2", 1)
    expected = hybrid_of([a, b], [HALF] * 4)(IDS).logits
    b.cuda()
    torch.testing.assert_close(hybrid_of([a, b], [HALF] * 4)(IDS).logits, expected, rtol=1e-3, atol=1e-3)
