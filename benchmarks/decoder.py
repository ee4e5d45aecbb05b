"""A whole small decoder (6 layers, width 512, random weights), every linear layer routed: prefill and cached decode.

    python -m benchmarks.decoder [--quick]

Against the bare model and against PEFT with one adapter of the same rank. Everything alternates in one run.
"""

import argparse
import copy
import time
from typing import Any

import torch
from torch import nn

from benchmarks.timing import alternate, machine, show, summary, write
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.composition.probe import probe
from mixwright.experts.lora import LoraExperts
from mixwright.routers.gate import PrototypeScores
from mixwright.routers.shared import share
from mixwright.routers.token import TokenRouter
from mixwright.sites import linear_sites

RANK, TOP_K, VOCABULARY = 16, 2, 2048


def backbone() -> nn.Module:
    """A Llama of about 20 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def composed(model: nn.Module, experts: int, *, sharing: bool) -> ComposedModel:
    """Every linear layer of every block routed among random experts, as `mw.compose` builds it from a catalogue."""
    make = torch.Generator().manual_seed(experts)
    sites = {path: site for path, site in linear_sites(model).items() if "lm_head" not in path}
    seen = probe(model, list(sites))
    mixtures: dict[str, Mixture] = {}
    for path in seen.sites:
        site = sites[path]
        down = torch.randn(experts, RANK, site.d_in, generator=make) * site.d_in**-0.5
        up = torch.randn(experts, site.d_out, RANK, generator=make) * 0.01
        gates = torch.randn(experts, site.d_in, generator=make) * 0.1
        router = TokenRouter(
            PrototypeScores(gates), TOP_K, stream=seen.sites[path].stream, order=seen.sites[path].order
        )
        mixtures[path] = Mixture(model.get_submodule(path), router, LoraExperts(down, up, torch.ones(experts), experts))
    if sharing:
        for paths in seen.groups():
            share(mixtures[path].router.scores for path in paths)  # type: ignore[union-attr]
    return ComposedModel(model, mixtures, [f"expert{e}" for e in range(experts)], probe=seen)


def with_one_adapter(model: nn.Module) -> nn.Module | None:
    """PEFT with one LoRA at the same layers, or None where PEFT is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return None
    names = sorted({path.rsplit(".", 1)[-1] for path in linear_sites(model) if "lm_head" not in path})
    config = LoraConfig(r=RANK, target_modules=names, init_lora_weights=False)
    return get_peft_model(model, config).eval()  # type: ignore[arg-type]


def contenders(experts: tuple[int, ...]) -> dict[str, nn.Module]:
    """Name -> model; all on copies of one backbone."""
    model = backbone()
    models: dict[str, nn.Module] = {"bare model": model}
    adapted = with_one_adapter(copy.deepcopy(model))
    if adapted is not None:
        models["PEFT, one adapter"] = adapted
    for count in experts:
        models[f"mixwright, {count} experts"] = composed(copy.deepcopy(model), count, sharing=True)
        models[f"the same, scores not shared ({count})"] = composed(copy.deepcopy(model), count, sharing=False)
    return models


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], *, batch: int, prompt: int, steps: int, rounds: int, cpu: bool = False
) -> dict[str, Any]:
    """Prefill of `prompt` tokens, and `steps` tokens decoded greedily after a prompt of the same length."""
    tokens = torch.randint(VOCABULARY, (batch, prompt), generator=torch.Generator().manual_seed(1))

    def prefill(model: nn.Module) -> Any:
        return lambda: model(tokens, use_cache=True, logits_to_keep=1)

    def decode(model: nn.Module) -> Any:
        def run() -> None:
            cache = model(tokens[:, :8], use_cache=True).past_key_values
            token = tokens[:, 8:9]
            for _ in range(steps):
                out = model(token, past_key_values=cache, use_cache=True)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values

        return run

    result: dict[str, Any] = {}
    for phase, make in (("prefill", prefill), ("decode", decode)):
        times = summary(
            alternate({name: make(model) for name, model in models.items()}, rounds=rounds, cpu=cpu), "bare model"
        )
        show(f"{phase}: batch {batch}, " + (f"{prompt} tokens" if phase == "prefill" else f"{steps} steps"), times)
        result[phase] = times
    return {"batch": batch, "prompt": prompt, "steps": steps, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time; with one thread, for a busy machine")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 36])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--name", default="decoder", help="of the file in benchmarks/results")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    started = time.process_time()
    models = contenders(tuple(given.experts))
    rounds = given.rounds or (7 if given.quick else 30)
    cases = [
        measure(models, batch=batch, prompt=512 // batch, steps=16, rounds=rounds, cpu=given.cpu_time)
        for batch in (1, 8)
    ]
    print(f"written: {write(given.name, {'machine': machine(started), 'cases': cases})}")


if __name__ == "__main__":
    main()
