"""A hybrid generates as its components do: one cache for each, moved and cropped together."""

from typing import Any

import pytest
import torch

from mixwright.backbones.hybrid_cache import HybridCache

IDS = torch.randint(4, 264, (2, 6), generator=torch.Generator().manual_seed(1))
HALF, A = [0.5, 0.5], [1.0, 0.0]
DECODE: dict[str, Any] = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 2.0, "top_k": 0, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("jamba", "mamba2"), ("gpt2", "llama", "mamba2")])
def test_generating_with_and_without_a_cache(families: Any, mode: str, tiny: Any, hybrid_of: Any) -> None:
    components = [tiny(family, i) for i, family in enumerate(families)]
    hybrid = hybrid_of(components, [[1 / len(components)] * len(components)] * 4)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(hybrid.generate(IDS, attention_mask=mask, use_cache=use_cache, **DECODE, **MODES[mode]))
    assert torch.equal(*found)
    assert found[0].shape[1] == IDS.shape[1] + 5


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", ["gpt_neox", "mamba2", "jamba", "recurrent_gemma"])
def test_one_hot_generates_what_the_component_does(family: str, mode: str, tiny: Any, hybrid_of: Any) -> None:
    component = tiny(family)
    hybrid = hybrid_of([component, tiny("llama", 1)], [A] * 4)
    if (family, mode) == ("recurrent_gemma", "beams"):
        with pytest.raises(ValueError, match="keeps its state in its modules"):
            hybrid.generate(IDS, **DECODE, **MODES[mode])
        return
    assert torch.equal(hybrid.generate(IDS, **DECODE, **MODES[mode]), component.generate(IDS, **DECODE, **MODES[mode]))


def test_a_component_without_a_cache_is_run_anew(tiny: Any, hybrid_of: Any) -> None:
    rwkv = tiny("rwkv")
    hybrid = hybrid_of([rwkv, tiny("llama", 1)], [A] * 4)
    assert hybrid.uncached() == "RwkvForCausalLM-0"
    assert torch.equal(hybrid.generate(IDS, **DECODE), rwkv.generate(IDS, use_cache=False, **DECODE))


@torch.no_grad()
def filled(hybrid: Any, ids: Any = IDS) -> HybridCache:
    return hybrid(ids, use_cache=True).past_key_values


@pytest.fixture
def pair(tiny: Any, hybrid_of: Any) -> Any:
    return hybrid_of([tiny("gpt_neox"), tiny("mamba2", 1)], [HALF] * 4)


@pytest.mark.parametrize("indices", [torch.tensor([1, 1, 0]), torch.tensor([False, True])])
@torch.no_grad()
def test_rows_are_chosen_and_repeated(pair: Any, indices: torch.Tensor) -> None:
    cache, step = filled(pair), torch.full((len(IDS), 1), 7)
    expected = pair(step, past_key_values=filled(pair)).logits
    rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
    cache.batch_select_indices(indices)
    assert cache.batch_size == len(rows)
    torch.testing.assert_close(pair(step[rows], past_key_values=cache).logits, expected[rows])
    cache = filled(pair)
    cache.batch_repeat_interleave(2)
    repeated = pair(step.repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0))


@torch.no_grad()
def test_it_can_be_emptied(pair: Any) -> None:
    cache = filled(pair)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized, cache.get_max_length()) == (6, 2, True, -1)
    cache.reset()
    assert (cache.get_seq_length(), cache.is_initialized) == (0, False)
    torch.testing.assert_close(pair(IDS, past_key_values=cache).logits, pair(IDS).logits)


@torch.no_grad()
def test_tokens_are_taken_back_where_there_is_no_state(tiny: Any, hybrid_of: Any, pair: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("llama", 1)], [HALF] * 4)
    cache = filled(hybrid)
    assert cache.is_croppable
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    torch.testing.assert_close(hybrid(IDS[:, 4:], past_key_values=cache).logits, hybrid(IDS).logits[:, 4:])
    cache = filled(pair)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="component 'Mamba2ForCausalLM-1' keeps a recurrent state"):
        cache.crop(-1)
    cache.crop(0)


def test_an_assistant_helps_where_tokens_can_be_taken_back(tiny: Any, hybrid_of: Any, pair: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("llama", 1)], [HALF] * 4)
    options = {**DECODE, "do_sample": False}
    expected = hybrid.generate(IDS[:1], **options)
    assert torch.equal(hybrid.generate(IDS[:1], assistant_model=tiny("gpt2", 2), **options), expected)
    assert torch.equal(hybrid.generate(IDS[:1], prompt_lookup_num_tokens=2, **options), expected)
    with pytest.raises(ValueError, match="stateful"):
        pair.generate(IDS[:1], assistant_model=tiny("gpt2", 2), **options)


@torch.no_grad()
def test_a_component_can_not_join_in_the_middle_of_a_text(tiny: Any, hybrid_of: Any) -> None:
    hybrid = hybrid_of([tiny("gpt_neox"), tiny("mamba2", 1)], [A] * 4)
    cache = filled(hybrid)
    for slot in (hybrid.embedding, *hybrid.blocks, hybrid.head):
        slot.weights.fill_(0.5)
    with pytest.raises(ValueError, match="'Mamba2ForCausalLM-1' has no part in this cache: .* 6 tokens"):
        hybrid(IDS, past_key_values=cache)


def test_other_kinds_of_cache_are_refused(pair: Any) -> None:
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        pair.generate(IDS, cache_implementation="static", **DECODE)


def test_a_text_goes_on_from_the_cache_that_was_returned(pair: Any) -> None:
    options = {**DECODE, "do_sample": False}
    whole = pair.generate(IDS, **{**options, "max_new_tokens": 8})
    first = pair.generate(IDS, return_dict_in_generate=True, **options)
    again = pair.generate(first.sequences, past_key_values=first.past_key_values, **{**options, "max_new_tokens": 3})
    assert torch.equal(again, whole)
