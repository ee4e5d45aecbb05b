"""The composed model: contexts, conditions, masks, foreign habits, and what tools of the ecosystem do with it."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.experts.lora import LoraExperts
from mixwright.routers.base import AbstractRouter
from mixwright.routers.constant import ConstantRouter
from mixwright.routers.task import TaskRouter
from mixwright.routing import Condition, Routing

IDS = torch.tensor([[5, 9, 17, 33, 65], [8, 13, 21, 34, 55]])


@pytest.fixture
def gpt2(pool_of: Any, composed: Any) -> ComposedModel:
    backbone = tiny_backbone("gpt2")
    return composed(backbone, pool_of(backbone))


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def with_routers(model: ComposedModel, router: AbstractRouter) -> dict[str, AbstractRouter]:
    return dict.fromkeys(model.mixtures, router)


class Listening(AbstractRouter):
    """Keeps the conditions it was called with."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.heard: list[Condition] = []

    def forward(self, x: Tensor, condition: Condition) -> Routing:
        self.heard.append(condition)
        return Routing(torch.full((self.num_experts,), 1 / self.num_experts), self.num_experts)


def test_only_is_that_expert(gpt2: ComposedModel, pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("gpt2")
    pool = pool_of(tiny_backbone("gpt2"))
    alone = composed(backbone, {"c": pool["c"]}, top_k=1)
    with gpt2.only("c"):
        torch.testing.assert_close(logits(gpt2), logits(alone))
    with pytest.raises(ValueError, match="no expert 'z' in this model; it has a, b, c, d"):
        with gpt2.only("z"):
            pass


@pytest.mark.parametrize("context", ["only", "disabled", "replaced", "routed_by", "trace"])
def test_contexts_end_also_when_something_fails(gpt2: ComposedModel, context: str) -> None:
    before = logits(gpt2)
    given: dict[str, tuple[Any, ...]] = {
        "only": ("a",),
        "replaced": (with_routers(gpt2, ConstantRouter(torch.ones(4))),),
        "routed_by": (Routing(torch.ones(4), 4),),
    }
    with pytest.raises(RuntimeError, match="on purpose"), getattr(gpt2, context)(*given.get(context, ())):
        logits(gpt2)
        raise RuntimeError("on purpose")
    assert torch.equal(logits(gpt2), before)
    assert gpt2.channel.trace is None


def test_contexts_nest(gpt2: ComposedModel) -> None:
    routed = logits(gpt2)
    with gpt2.only("a"):
        one = logits(gpt2)
        with gpt2.only("b"):
            assert not torch.equal(logits(gpt2), one)
        with gpt2.disabled():
            assert not torch.equal(logits(gpt2), one)
        assert torch.equal(logits(gpt2), one)
    assert torch.equal(logits(gpt2), routed)


def test_an_inactive_expert_can_not_move_a_bit(gpt2: ComposedModel) -> None:
    gpt2.set_active(["a", "c", "d"])
    assert gpt2.active == ("a", "c", "d")
    before = logits(gpt2)
    with torch.no_grad():
        for mixture in gpt2.mixtures.values():
            mixture.experts.up[1] = float("nan")
            mixture.router.scores.prototypes[1] = 1e6
    assert torch.equal(logits(gpt2), before)


def test_active_can_be_widened_again(gpt2: ComposedModel) -> None:
    everyone = logits(gpt2)
    saved = {k: v.clone() for k, v in gpt2.added_state().items()}
    gpt2.set_active(["b"])
    assert not torch.equal(logits(gpt2), everyone)
    assert all(torch.equal(saved[name], tensor) for name, tensor in gpt2.added_state().items())
    gpt2.set_active(["a"])
    gpt2.set_active(None)
    assert torch.equal(logits(gpt2), everyone)
    assert gpt2.active == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match="no expert 'z'"):
        gpt2.set_active(["z"])


def test_a_router_that_can_not_choose_refuses_to_leave_out(gpt2: ComposedModel) -> None:
    with (
        gpt2.replaced(with_routers(gpt2, ConstantRouter(torch.ones(4)))),
        pytest.raises(ValueError, match="can't leave"),
    ):
        gpt2.set_active(["a"])


def test_masks_are_those_of_the_tokens_of_the_pass(gpt2: ComposedModel) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    router = Listening(4)
    with gpt2.replaced(with_routers(gpt2, router)):
        gpt2.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    first, last = router.heard[0], router.heard[-1]
    assert torch.equal(first.token_mask, mask.bool())
    assert torch.equal(last.token_mask, torch.ones(2, 1, dtype=torch.bool))
    logits(gpt2)
    with gpt2.replaced(with_routers(gpt2, router)):
        gpt2(IDS, None, mask)
    assert torch.equal(router.heard[-1].token_mask, mask.bool())


def test_an_encoder_called_by_generate_has_its_own_mask(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("t5")
    model = composed(backbone, pool_of(backbone))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    router = Listening(4)
    with model.replaced(with_routers(model, router)):
        model.generate(input_ids=IDS, attention_mask=mask, num_beams=2, max_new_tokens=2)
        assert torch.equal(router.heard[0].encoder_mask, mask.bool())
        assert router.heard[0].token_mask is None
        assert torch.equal(router.heard[-1].encoder_mask, mask.bool().repeat_interleave(2, 0))
        router.heard.clear()
        model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS[:, :2])
        assert torch.equal(router.heard[0].encoder_mask, mask.bool())


def test_task_ids_follow_the_beams(gpt2: ComposedModel) -> None:
    condition = Condition(task_ids=torch.tensor([2, 0]))
    with gpt2.replaced(with_routers(gpt2, TaskRouter(torch.eye(4)))):
        with pytest.raises(ValueError, match="task router needs"):
            logits(gpt2)
        both = gpt2.generate(input_ids=IDS, condition=condition, num_beams=3, max_new_tokens=4, pad_token_id=0)
        per_row = logits(gpt2, condition=condition)
    for row, expert in enumerate(("c", "a")):
        with gpt2.only(expert):
            torch.testing.assert_close(logits(gpt2)[row], per_row[row])
            alone = gpt2.generate(input_ids=IDS[row : row + 1], num_beams=3, max_new_tokens=4, pad_token_id=0)
        assert torch.equal(alone[0], both[row])


def test_gradient_checkpointing_gives_the_same_gradients(pool_of: Any, composed: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny_backbone("llama")
        model = composed(backbone, pool_of(backbone)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        condition = Condition(task_ids=torch.tensor([2, 0]))
        with model.replaced(with_routers(model, TaskRouter(torch.eye(4)))):
            model(input_ids=IDS, labels=IDS, condition=condition).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_deepcopy_is_a_model_of_its_own(gpt2: ComposedModel) -> None:
    twin = copy.deepcopy(gpt2)
    assert torch.equal(logits(twin), logits(gpt2))
    with twin.disabled(), gpt2.trace() as trace:
        assert not torch.equal(logits(twin), logits(gpt2))
    assert all(len(passes) == 1 for passes in trace.values())
    assert all(m.channel is twin.channel for m in twin.mixtures.values())
    assert twin.forward.model is twin


def test_moves_and_casts(gpt2: ComposedModel) -> None:
    gpt2.to(torch.float64)
    assert logits(gpt2).dtype is torch.float64
    assert gpt2.dtype is torch.float64
    gpt2.to(torch.bfloat16)
    with gpt2.trace() as trace:
        assert logits(gpt2).dtype is torch.bfloat16
    assert all(routing.weights.dtype is torch.float32 for passes in trace.values() for routing in passes)


def test_hooks_on_the_backbones_layers_still_fire(pool_of: Any, composed: Any) -> None:
    backbone = tiny_backbone("llama")
    layer = backbone.model.layers[0].self_attn.q_proj
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    logits(composed(backbone, pool_of(backbone)))
    assert calls


def test_what_foreign_code_asks_of_a_layer_is_answered(gpt2: ComposedModel) -> None:
    mixture = gpt2.mixtures["transformer.h.0.attn.c_attn"]
    assert mixture.weight is mixture.base.weight
    assert (mixture.nf, mixture.nx) == (96, 32)
    with pytest.raises(AttributeError):
        _ = mixture.no_such_thing


def test_a_layer_under_two_paths_is_replaced_at_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x) + self.first(x)

    backbone, x = Shared(), torch.randn(2, 3, 4)
    bare = backbone(x)
    experts = LoraExperts(torch.ones(1, 1, 4), torch.ones(1, 4, 1), torch.ones(1), 1)
    model = ComposedModel(backbone, {"first": Mixture(backbone.first, ConstantRouter(torch.ones(1)), experts)}, ["e"])
    torch.testing.assert_close(model(x), bare + 2 * x.sum(-1, keepdim=True))
    assert torch.equal(model.remove()(x), bare)


def test_torchs_fused_encoder_layer_does_not_pass_the_experts_by() -> None:
    backbone, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 3, 16)
    experts = LoraExperts(torch.randn(1, 2, 16), torch.randn(1, 32, 2), torch.ones(1), 1)
    with torch.no_grad():
        bare = backbone(x)
        mixture = Mixture(backbone.linear1, ConstantRouter(torch.ones(1)), experts)
        model = ComposedModel(backbone, {"linear1": mixture}, ["e"])
        assert (model(x) - bare).abs().max() > 1e-3
        torch.testing.assert_close(model.remove()(x), bare)


def test_it_looks_like_its_backbone(gpt2: ComposedModel) -> None:
    assert gpt2.config is gpt2.backbone.config
    assert gpt2.main_input_name == "input_ids"
    assert gpt2.can_generate()
    assert gpt2.device == torch.device("cpu")
    names = list(inspect.signature(gpt2.forward).parameters)
    assert {"input_ids", "attention_mask", "labels", "condition"} <= set(names)
    with pytest.raises(AttributeError):
        _ = gpt2.no_such_thing


def test_counts_of_parameters(gpt2: ComposedModel, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2.print_trainable_parameters()
    trainable = sum(p.numel() for p in gpt2.parameters() if p.requires_grad)
    assert f"trainable params: {trainable:,} ||" in capsys.readouterr().out
    assert gpt2.num_added_parameters() == sum(t.numel() for t in gpt2.added_state().values())


def test_what_an_evaluation_harness_calls(gpt2: ComposedModel) -> None:
    before = logits(gpt2)
    gpt2.eval()
    gpt2.tie_weights()
    assert gpt2.get_input_embeddings() is gpt2.backbone.get_input_embeddings()
    with torch.no_grad():
        assert torch.equal(gpt2(IDS).logits, before)
    answer = gpt2.generate(input_ids=IDS, max_length=8, pad_token_id=0, use_cache=True, do_sample=False)
    assert answer.shape == (2, 8)


def test_a_backbone_that_was_placed_by_a_device_map(tmp_path: Path, pool_of: Any, composed: Any) -> None:
    from mixwright.backbones.hf import load_backbone

    tiny_backbone("llama").save_pretrained(tmp_path)
    plain, placed = load_backbone(tmp_path), load_backbone(tmp_path, device_map={"model": "cpu", "lm_head": "cpu"})
    pool = pool_of(plain)
    assert torch.equal(logits(composed(placed, pool)), logits(composed(plain, pool)))


def test_text_generation_pipeline(gpt2: ComposedModel) -> None:
    from transformers import pipeline

    from mixwright.backbones.hf import byte_tokenizer

    write = pipeline("text-generation", model=gpt2, tokenizer=byte_tokenizer())
    (answer,) = write("ab", max_new_tokens=3, do_sample=False)
    assert answer["generated_text"].startswith("ab")
    (bare,) = pipeline("text-generation", model=tiny_backbone("gpt2"), tokenizer=byte_tokenizer())(
        "ab", max_new_tokens=3, do_sample=False
    )
    with gpt2.disabled():
        (off,) = write("ab", max_new_tokens=3, do_sample=False)
    assert off == bare


def test_transformers_trainer(gpt2: ComposedModel, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids, "unused": "x"} for ids in IDS.repeat(4, 1).tolist()]
    frozen = {n: p.clone() for n, p in gpt2.named_parameters() if not p.requires_grad}
    before = gpt2.mixtures["transformer.h.0.attn.c_attn"].experts.up.detach().clone()
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    outcome = Trainer(gpt2, settings, train_dataset=rows).train()
    assert outcome.training_loss > 0
    assert not torch.equal(gpt2.mixtures["transformer.h.0.attn.c_attn"].experts.up, before)
    assert all(torch.equal(p, frozen[n]) for n, p in gpt2.named_parameters() if n in frozen)
