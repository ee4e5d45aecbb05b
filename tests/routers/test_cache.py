"""Shared decisions and caches: decoding step by step is the same as one pass, whoever moves the rows of the cache."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.composition.memory import MemoryLayer
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites

EXPERTS, RANK = 4, 2
ON = {"consensus": 1.5, "pooling": 0.7, "prior": 1.0}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=49, decoder_start_token_id=0, tie_word_embeddings=False, initializer_factor=0.5,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def compose(backbone: nn.Module, null_expert: float | None = None, **options: float) -> ComposedModel:
    """Random experts and gates at every linear layer but the head, placed as the probe says."""
    from mixwright.composition.probe import probe

    draw = torch.Generator().manual_seed(1)
    sites = {path: site for path, site in linear_sites(backbone).items() if path != "lm_head"}
    seen = probe(backbone, tuple(sites)).sites
    mixtures: dict[str, Mixture] = {}
    for path, site in sites.items():
        factors: list[tuple[Tensor, Tensor, float] | None] = [
            (0.4 * torch.randn(RANK, site.d_in, generator=draw), torch.randn(site.d_out, RANK, generator=draw), 0.5)
            for _ in range(EXPERTS)
        ]
        scores = PrototypeScores(torch.randn(EXPERTS, site.d_in, generator=draw))
        place: dict[str, Any] = {"stream": seen[path].stream, "order": seen[path].order}
        router = TokenRouter(scores, 2, null_expert=null_expert, **place, **options)
        members = LoraExperts.stack(factors if null_expert is None else [*factors, None])
        mixtures[path] = Mixture(backbone.get_submodule(path), router, members)
    names = [f"e{i}" for i in range(EXPERTS)] + ([] if null_expert is None else ["backbone"])
    return ComposedModel(backbone, mixtures, names)


@pytest.fixture(scope="module", params=[ON, {"consensus": 3.0}, {"pooling": 0.7}], ids=str)
def decoder(request: pytest.FixtureRequest) -> ComposedModel:
    return compose(llama(), **request.param)


@pytest.fixture(scope="module", params=[ON, {"consensus": 3.0}], ids=str)
def both(request: pytest.FixtureRequest) -> ComposedModel:
    return compose(t5(), **request.param)


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


PROMPT = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]])
MASK = (PROMPT > 0).long()
STEPS = 6


def generated(model: ComposedModel, prompt: Tensor = PROMPT, mask: Tensor = MASK, **options: Any) -> Any:
    arguments = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(input_ids=prompt, attention_mask=mask, **(arguments | options))


def test_greedy_decoding_equals_one_pass(decoder: ComposedModel) -> None:
    out = generated(decoder)
    mask = torch.cat([MASK, torch.ones(2, STEPS, dtype=torch.long)], 1)
    whole = decoder(input_ids=out.sequences, attention_mask=mask).logits[:, -STEPS - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-5, rtol=1e-5)


def test_routing_of_each_step_equals_that_of_one_pass(decoder: ComposedModel) -> None:
    with decoder.trace() as steps:
        out = generated(decoder)
    mask = torch.cat([MASK, torch.ones(2, STEPS, dtype=torch.long)], 1)
    with decoder.trace() as whole:
        decoder(input_ids=out.sequences[:, :-1], attention_mask=mask[:, :-1])
    for site, (routing,) in whole.items():
        pieces = torch.cat([step.dense() for step in steps[site]], 1)
        torch.testing.assert_close(
            pieces[mask[:, :-1].bool()], routing.dense()[mask[:, :-1].bool()], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_with_a_cache_equal_beams_without(decoder: ComposedModel, options: dict[str, int]) -> None:
    cached, plain = (generated(decoder, use_cache=cache, output_scores=True, **options) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)


def test_sampling_with_a_cache_equals_sampling_without(decoder: ComposedModel) -> None:
    out = []
    for cache in (True, False):
        torch.manual_seed(7)
        out.append(generated(decoder, do_sample=True, use_cache=cache, num_return_sequences=3).sequences)
    assert torch.equal(*out)


def test_left_padding_and_neighbours_change_nothing(decoder: ComposedModel) -> None:
    batch = generated(decoder)
    alone = generated(decoder, PROMPT[:1, 3:], MASK[:1, 3:])
    assert torch.equal(batch.sequences[:1, 7:], alone.sequences[:, 4:])
    torch.testing.assert_close(torch.stack(batch.logits)[:, :1], torch.stack(alone.logits), atol=1e-5, rtol=1e-5)
    turned = generated(decoder, PROMPT.flip(0), MASK.flip(0))
    torch.testing.assert_close(torch.stack(turned.logits).flip(1), torch.stack(batch.logits), atol=1e-5, rtol=1e-5)


def test_right_padding_changes_nothing(decoder: ComposedModel) -> None:
    padded = torch.cat([PROMPT[:, 3:], torch.zeros(2, 2, dtype=torch.long)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 2)
    here = decoder(input_ids=padded, attention_mask=mask).logits[:, :4]
    torch.testing.assert_close(here, decoder(input_ids=padded[:, :4]).logits, atol=1e-5, rtol=1e-5)


def test_a_prompt_in_pieces_equals_the_whole(decoder: ComposedModel) -> None:
    first = decoder(input_ids=PROMPT[:, :4], attention_mask=MASK[:, :4], use_cache=True)
    second = decoder(input_ids=PROMPT[:, 4:], attention_mask=MASK, past_key_values=first.past_key_values)
    whole = decoder(input_ids=PROMPT, attention_mask=MASK)
    torch.testing.assert_close(second.logits, whole.logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_a_copied_prefix_serves_twice(decoder: ComposedModel) -> None:
    from copy import deepcopy

    prefix = decoder(input_ids=PROMPT[1:, :4], use_cache=True).past_key_values
    for rest in (PROMPT[1:, 4:], PROMPT[1:, 4:].flip(1)):
        out = decoder(input_ids=rest, past_key_values=deepcopy(prefix)).logits
        whole = decoder(input_ids=torch.cat([PROMPT[1:, :4], rest], 1)).logits[:, 4:]
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-5)


def test_assisted_decoding_equals_greedy(decoder: ComposedModel) -> None:
    plain = generated(decoder, PROMPT[1:], MASK[1:], max_new_tokens=12)
    assistant = llama()
    assisted = generated(decoder, PROMPT[1:], MASK[1:], max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(plain.sequences, assisted.sequences)
    looked_up = generated(decoder, PROMPT[1:], MASK[1:], max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(plain.sequences, looked_up.sequences)


def test_a_cache_moves_its_memory() -> None:
    model = compose(llama(), **ON)
    cache = model(input_ids=PROMPT, attention_mask=MASK, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.reorder_cache(torch.tensor([1, 0]))
    tokens = torch.tensor([[20], [21]])
    out = model(input_ids=tokens, attention_mask=torch.cat([MASK, torch.ones(2, 1)], 1), past_key_values=cache).logits
    whole = model(
        input_ids=torch.cat([PROMPT, tokens], 1), attention_mask=torch.cat([MASK, torch.ones(2, 1)], 1)
    ).logits
    torch.testing.assert_close(out[:, 0], whole[:, -1], atol=1e-5, rtol=1e-5)
    cache.crop(-1)
    out = model(
        input_ids=tokens + 5, attention_mask=torch.cat([MASK, torch.ones(2, 1)], 1), past_key_values=cache
    ).logits
    whole = model(
        input_ids=torch.cat([PROMPT, tokens + 5], 1), attention_mask=torch.cat([MASK, torch.ones(2, 1)], 1)
    ).logits
    torch.testing.assert_close(out[:, 0], whole[:, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="cropped by 6 tokens"):
        cache.crop(-6)
    cache.reset()
    assert not next(layer for layer in cache.layers if isinstance(layer, MemoryLayer)).memory.tokens


def test_consensus_alone_adds_nothing_to_a_cache() -> None:
    model = compose(llama(), consensus=2.0)
    cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    assert not any(isinstance(layer, MemoryLayer) for layer in cache.layers)


@pytest.mark.parametrize(
    "make", [lambda model: model.disabled(), lambda model: model.only("e0")], ids=["disabled", "only"]
)
def test_a_cache_of_tokens_nobody_remembers_is_refused(make: Callable[[ComposedModel], Any]) -> None:
    model = compose(llama(), **ON)
    with make(model):
        cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the cache holds 7 tokens"):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)
    cache = model(input_ids=PROMPT, use_cache=True).past_key_values
    with make(model):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 1 tokens"):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)


def test_a_cache_that_cannot_carry_it_is_refused_only_when_needed() -> None:
    class Legacy(dict[str, Any]):
        """A cache of another kind."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs_embeds: Tensor) -> dict[str, Any]:
            return {"logits": self.layer(inputs_embeds), "past_key_values": Legacy(a=1)}

    def built(**options: float) -> ComposedModel:
        backbone = Foreign()
        factors: list[Any] = [(torch.randn(1, 4), torch.randn(4, 1), 1.0)] * 2
        router = TokenRouter(PrototypeScores(torch.randn(2, 4)), 1, **options)  # type: ignore[arg-type]
        mixture = Mixture(backbone.layer, router, LoraExperts.stack(factors))
        return ComposedModel(backbone, {"layer": mixture}, ["a", "b"])

    built(consensus=1.0)(inputs_embeds=torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="a cache of type Legacy can't carry"):
        built(pooling=0.5)(inputs_embeds=torch.randn(1, 3, 4))


SOURCE = torch.tensor([[5, 6, 7, 49, 0, 0], [9, 10, 11, 12, 13, 49]])
SOURCE_MASK = (SOURCE > 0).long()


def whole_pass(model: ComposedModel, sequences: Tensor) -> Tensor:
    return model(input_ids=SOURCE, attention_mask=SOURCE_MASK, decoder_input_ids=sequences[:, :-1]).logits


def test_greedy_encoder_decoder_equals_one_pass(both: ComposedModel) -> None:
    out = generated(both, SOURCE, SOURCE_MASK, min_new_tokens=STEPS)
    suppressed = torch.stack(out.logits, 1)
    torch.testing.assert_close(suppressed, whole_pass(both, out.sequences), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_encoder_decoder_beams_with_a_cache_equal_beams_without(both: ComposedModel, options: dict[str, int]) -> None:
    cached, plain = (
        generated(both, SOURCE, SOURCE_MASK, use_cache=cache, output_scores=True, **options) for cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)


def test_encoder_decoder_padding_changes_nothing(both: ComposedModel) -> None:
    batch = generated(both, SOURCE, SOURCE_MASK, min_new_tokens=STEPS)
    alone = generated(both, SOURCE[:1, :4], SOURCE_MASK[:1, :4], min_new_tokens=STEPS)
    torch.testing.assert_close(torch.stack(batch.logits)[:, :1], torch.stack(alone.logits), atol=1e-5, rtol=1e-5)


def test_the_prior_reaches_the_decoder_from_the_source() -> None:
    model = compose(t5(), prior=2.0)
    with model.trace() as trace:
        whole_pass(model, PROMPT)
    plain = compose(t5())
    with plain.trace() as before:
        whole_pass(plain, PROMPT)
    last = [site for site in trace if site.startswith("decoder")][-1]
    first_token = (trace[last][0].dense()[:, 0] - before[last][0].dense()[:, 0]).abs().max()
    assert first_token > 1e-3  # it has no earlier decoder token: what it hears comes from the source


@pytest.mark.parametrize("make", [llama, t5], ids=["llama", "t5"])
def test_where_the_null_expert_wins_the_output_is_the_backbones(make: Callable[[], nn.Module]) -> None:
    model = compose(make(), null_expert=1e4, **ON)
    arguments = {"input_ids": SOURCE, "attention_mask": SOURCE_MASK}
    arguments |= {"decoder_input_ids": PROMPT} if make is t5 else {}
    routed = model(**arguments).logits
    with model.disabled():
        assert torch.equal(routed, model(**arguments).logits)
    open_model = compose(make(), null_expert=-1e4)
    torch.testing.assert_close(open_model(**arguments).logits, compose(make())(**arguments).logits)


@pytest.mark.parametrize("make", [llama, t5], ids=["llama", "t5"])
def test_all_off_is_plain_phatgoose_to_the_last_bit(make: Callable[[], nn.Module]) -> None:
    arguments = {"input_ids": SOURCE, "attention_mask": SOURCE_MASK}
    arguments |= {"decoder_input_ids": PROMPT} if make is t5 else {}
    off = compose(make(), consensus=0.0, pooling=0.0, prior=0.0)(**arguments).logits
    assert torch.equal(off, compose(make())(**arguments).logits)


def test_a_layer_that_runs_again_after_its_pass_is_refused() -> None:
    model = compose(llama(), **ON)
    model(input_ids=PROMPT)
    with pytest.raises(ValueError, match="needs the memory of a running pass"):
        model.backbone.model.layers[0](
            torch.randn(1, 2, 16), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
        )
