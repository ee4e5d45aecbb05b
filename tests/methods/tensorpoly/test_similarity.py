"""Unknown tasks: separable texts find their task, noise is routed uniformly, and all of it is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright as mw
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.tasks import task_of
from mixwright.errors import CatalogError
from mixwright.methods.tensorpoly.similarity import check_remembered, cosines, features
from mixwright.methods.tensorpoly.task_rows import task_routers

from .teacher import sharp

SMALL: dict[str, Any] = {"rank": 2, "num_latent": 4}
FAMILY = {"causal": ("llama", "down_proj"), "seq2seq": ("t5", "wo"), "encoder": ("bert", "output.dense")}
LETTERS = {"vowels": "aeiou", "digits": "0123456789", "marks": "!?.,;:-"}


def texts(task: str, count: int, seed: int = 0) -> list[str]:
    letters, draw = LETTERS.get(task, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"), torch.Generator().manual_seed(seed)
    picks = torch.randint(len(letters), (count, 12), generator=draw).tolist()
    return ["".join(letters[i] for i in row) for row in picks]


def acting(kind: str = "causal", **config: Any) -> Any:
    """A model whose tasks answer differently."""
    family, site = FAMILY[kind]
    settings = {**SMALL, "target_modules": (site,), **config}
    model = mw.compose("tensorpoly", backbone=tiny_backbone(family), tasks=(*LETTERS, "idle"), **settings)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixture in model.mixtures.values():
            for parameter in mixture.experts.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        for router in task_routers(model):
            router.logits.copy_(sharp(router.logits.shape, range(4)))
    return model.eval()


@pytest.fixture(scope="module", params=["causal", "seq2seq", "encoder"])
def knowing(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    model, tokenizer = acting(request.param), byte_tokenizer(request.param)
    for task in LETTERS:
        assert model.remember(task, texts(task, 20), tokenizer=tokenizer) == 20
    return model, tokenizer


def test_texts_of_known_tasks_are_found_and_trusted(knowing: tuple[Any, Any]) -> None:
    model, tokenizer = knowing
    mixed = [text for task in LETTERS for text in texts(task, 6, seed=9)]
    with model.with_similar(mixed, tokenizer=tokenizer) as guess:
        pass
    assert guess.nearest == tuple(task for task in LETTERS for _ in range(6))
    assert guess.trusted.all() and guess.confidence.median() == pytest.approx(1.0, abs=0.2)
    assert (guess.margin > 0.2).all() and (guess.entropy < 0.6).all()
    assert torch.allclose(guess.weights.sum(-1), torch.ones(18)) and (guess.weights[:, 3] == 0).all()
    assert guess.similarity[:, 3].isnan().all() and "0: vowels (confidence" in str(guess)


def test_noise_is_not_trusted_and_routed_uniformly(knowing: tuple[Any, Any]) -> None:
    model, tokenizer = knowing
    with model.with_similar(texts("capitals", 24, seed=4), tokenizer=tokenizer) as guess:
        pass
    assert guess.trusted.float().mean() <= 0.25 and guess.confidence.median() < 0.5
    assert (guess.weights[~guess.trusted] == 0).all()
    assert "uniform" in str(guess)


def test_routing_is_the_mixture_of_rows_and_uniform_what_is_left() -> None:
    model, tokenizer = acting(), byte_tokenizer()
    for task in LETTERS:
        model.remember(task, texts(task, 20), tokenizer=tokenizer)
    rows = [*texts("digits", 1, seed=9), *texts("vowels", 1, seed=9), *texts("marks", 1, seed=9)]
    ids = torch.tensor(tokenizer(rows)["input_ids"])
    with torch.no_grad():
        with model.with_similar(rows, tokenizer=tokenizer, temperature=0.01) as sharp_guess:
            found = model(input_ids=ids).logits
        with model.with_task(list(sharp_guess.nearest)):
            named = model(input_ids=ids).logits
        torch.testing.assert_close(found, named, rtol=1e-3, atol=1e-3)
        with model.with_similar(rows, tokenizer=tokenizer, threshold=2.0) as unsure:
            lost = model(input_ids=ids).logits
        even = model.routed_by(mw.Routing(torch.full((4,), 0.25), 4))
        with even:
            torch.testing.assert_close(lost, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert not unsure.trusted.any() and (found - lost).abs().max() > 1e-2
        with model.with_similar(rows, tokenizer=tokenizer) as guess:
            traced = model.trace()
            with traced as trace:
                model(input_ids=ids)
    routing = next(iter(trace.values()))[0].weights.flatten(1)
    table = next(iter(model.routing_table().values()))
    torch.testing.assert_close(routing, guess.weights @ table + (1 - guess.weights.sum(-1, keepdim=True)) / 4)


def test_beams_follow_their_own_row() -> None:
    model, tokenizer = acting(), byte_tokenizer()
    for task in LETTERS:
        model.remember(task, texts(task, 20), tokenizer=tokenizer)
    rows = [*texts("digits", 1, seed=9), *texts("vowels", 1, seed=9)]
    ids = torch.tensor(tokenizer(rows)["input_ids"])
    options: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    with model.with_similar(rows, tokenizer=tokenizer):
        together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for row, text in enumerate(rows):
        with model.with_similar([text], tokenizer=tokenizer):
            one = model.generate(input_ids=ids[row : row + 1], attention_mask=torch.ones_like(ids[:1]), **options)
        assert torch.equal(together[row : row + 1, : one.shape[1]], one)


def test_what_is_remembered_is_saved_and_survives_a_new_task(tmp_path: Path) -> None:
    model, tokenizer = acting(), byte_tokenizer()
    for task in LETTERS:
        model.remember(task, task_of([{"text": text} for text in texts(task, 9)], name=task), tokenizer=tokenizer)
    rows = texts("digits", 3, seed=9)
    with model.with_similar(rows, tokenizer=tokenizer) as before:
        pass
    model.adapt("more", [{"prompt": "a", "completion": "b"}], what="router", start="mean", steps=1, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "saved")
    again = mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    assert again.tasks == (*LETTERS, "idle", "more")
    with again.with_similar(rows, tokenizer=tokenizer) as after:
        pass
    assert torch.equal(after.weights[:, :-1], before.weights) and (after.weights[:, -1] == 0).all()
    assert again.remember("more", ["zzzz", "zzyz"], tokenizer=tokenizer) == 2
    with again.with_similar(["zzzzz"], tokenizer=tokenizer) as newest:
        assert newest.nearest == ("more",)


def test_features_are_the_bare_backbones_whatever_the_experts_do_and_padding_does_not_count() -> None:
    model, bare = acting(), tiny_backbone("llama")
    ids = torch.arange(5, 13)[None]
    alone = features(model, {"input_ids": ids})
    with torch.no_grad():
        torch.testing.assert_close(alone, bare.model(input_ids=ids).last_hidden_state.mean(1))
    padded = {"input_ids": torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)}
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(features(model, {**padded, "attention_mask": mask}), alone, rtol=1e-4, atol=1e-5)


def test_the_usual_similarity_is_that_of_a_tasks_own_texts() -> None:
    draw = torch.Generator().manual_seed(0)
    means = torch.randn(3, 64, generator=draw)
    samples = means[:, None] + 0.7 * torch.randn(3, 500, 64, generator=draw)
    squares = samples.square().sum(-1).mean(1)
    for task in range(3):
        found, usual = cosines(samples[task], samples.mean(1), squares)
        assert found[:, task].mean().item() == pytest.approx(usual[task].item(), rel=0.02)
        assert 0.3 < usual[task] < 0.9


def test_clear_errors() -> None:
    model, tokenizer = acting(), byte_tokenizer()
    with pytest.raises(ValueError, match=r"no task 'digit' in this model; it has vowels"):
        model.remember("digit", ["1"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"task 'digits': no texts"):
        model.remember("digits", [], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"task 'digits': a text is a int"):
        model.remember("digits", [3], tokenizer=tokenizer)
    model.remember("digits", ["1", "2"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"1 of 4 tasks are remembered, and resembling takes two or more"):
        model.with_similar(["1"], tokenizer=tokenizer).__enter__()
    model.remember("vowels", ["a", "e"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"condition.task_weights has 2 rows but the pass has 3"):
        with model.with_similar(["1", "2"], tokenizer=tokenizer):
            model(input_ids=torch.ones(3, 4, dtype=torch.long))
    lora = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), tasks=("a",), experts="lora")
    with pytest.raises(ValueError, match=r"tasks of this model do not choose"):
        lora.with_similar(["1"], tokenizer=tokenizer).__enter__()


@pytest.mark.parametrize(
    ("whole", "code"),
    [
        ({"task_features.mean": torch.zeros(2, 3)}, "TENSOR"),
        ({"strange": torch.zeros(2)}, "TENSOR"),
        ({"task_features.mean": torch.zeros(9, 3), "task_features.square": torch.zeros(9)}, "TENSOR"),
    ],
)
def test_broken_memories_are_refused(whole: dict[str, torch.Tensor], code: str) -> None:
    with pytest.raises(CatalogError, match=code):
        check_remembered(whole, 4)
    good = {"task_features.mean": torch.zeros(2, 3)} | {
        f"task_features.{name}": torch.zeros(2) for name in ("square", "count")
    }
    check_remembered(good, 2)
    check_remembered({}, 2)
    for bad in (good | {"task_features.count": torch.zeros(3)}, good | {"task_features.mean": torch.zeros(2)}):
        with pytest.raises(CatalogError, match="SHAPE"):
            check_remembered(bad, 4)
    with pytest.raises(CatalogError, match="SHAPE"):
        check_remembered(good, 1)
