"""Small composed models for the tests of evaluation: random experts on tiny random backbones."""

import pytest
import torch
from torch import nn

from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.data.synthetic import Language, exclusive
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites

LANGUAGE = Language(alphabets=3, symbols=4, templates=6, length=4)
SUITE = exclusive(LANGUAGE)


def backbone(kind: str, width: int = 16) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    ids = {"vocab_size": LANGUAGE.vocab_size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "seq2seq":
        shape = {"d_model": width, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1}
        start = {"decoder_start_token_id": 0, "tie_word_embeddings": False}
        return T5ForConditionalGeneration(T5Config(**ids, **shape, **start)).eval()
    shape = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 4, "bos_token_id": 0, "max_position_embeddings": 64, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**ids, **shape, **rest)).eval()


def pool(kind: str, count: int = 3, rank: int = 2) -> ComposedModel:
    model = backbone(kind)
    generator = torch.Generator().manual_seed(1)
    mixtures = {}
    for path, site in linear_sites(model).items():
        if "lm_head" in path:
            continue
        experts = LoraExperts(
            0.5 * torch.randn(count, rank, site.d_in, generator=generator),
            0.5 * torch.randn(count, site.d_out, rank, generator=generator),
            torch.tensor([1.0, 0.5, 2.0][:count]),
            count,
        )
        gates = torch.randn(count, site.d_in, generator=generator)
        mixtures[path] = Mixture(model.get_submodule(path), TokenRouter(PrototypeScores(gates), 2), experts)
    return ComposedModel(model, mixtures, [f"expert{i}" for i in range(count)]).requires_grad_(False).eval()


@pytest.fixture(scope="module", params=["seq2seq", "causal"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return pool(kind)


def batches(kind: str, task: int, count: int, seed: int = 0):
    examples = SUITE.experts[task].sample(LANGUAGE, count, seed)
    return [examples.seq2seq() if kind == "seq2seq" else examples.causal()]
