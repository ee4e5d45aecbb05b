"""Mixture weights without a search on the task: from what configs say, and from small hybrids on MAD."""

from dataclasses import replace

import pytest
import torch

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.data.mad import SMALL
from mixwright.data.mad_tasks import InContextRecall, Memorisation, SelectiveCopy
from mixwright.methods.manticore import programming
from mixwright.methods.manticore.config import ManticoreConfig
from mixwright.methods.manticore.programming import context_limit, program_from_mad, program_from_metadata

NEOX = {"model_type": "gpt_neox", "max_position_embeddings": 2048}
GPT_2 = {"model_type": "gpt2", "n_positions": 1024}
MAMBA = {"model_type": "mamba2", "state_size": 128}
TASKS = {"recall": InContextRecall(8, 8, num_train=64), "memory": Memorisation(8, 4, num_train=64)}


def small(**settings):
    return {"num_blocks": 2, "tasks": TASKS, "steps": 4, "batch_size": 4, **settings}


def test_a_context_limit_is_read_from_configs_models_and_names():
    assert [context_limit(c) for c in (NEOX, GPT_2, MAMBA, tiny_backbone("gpt2"))] == [2048, 1024, None, 512]
    assert context_limit("gpt_neox") == 2048 and context_limit("mamba2") is None
    with pytest.raises(ValueError, match="no model_type; it has n_positions"):
        context_limit({"n_positions": 4})


def test_who_cannot_read_the_context_has_weight_zero():
    rows = program_from_metadata([NEOX, MAMBA, GPT_2], num_blocks=2, context=2048)
    assert rows == ((0.5, 0.5, 0.0),) * 2
    assert program_from_metadata([NEOX, MAMBA], num_blocks=3, context=16384) == ((0.0, 1.0),) * 3  # as for Path-X
    assert program_from_metadata([NEOX, MAMBA], num_blocks=1, context=2049) == ((0.0, 1.0),)
    with pytest.raises(ValueError, match="no component reads 4096 tokens; their configs say 2048, 1024"):
        program_from_metadata([NEOX, GPT_2], num_blocks=1, context=4096)


def test_the_program_is_the_mean_over_tasks_of_weights_that_a_hybrid_can_have():
    program = program_from_mad(["gpt_neox", "mamba2"], **small())
    rows = torch.tensor(program.mixture_weights)
    each = torch.tensor([program.by_task[name] for name in TASKS])
    assert rows.shape == (2, 2) and torch.allclose(rows.sum(1), torch.ones(2)) and torch.allclose(rows, each.mean(0))
    assert not torch.equal(each[0], each[1]) and bool((each != 0.5).any())  # each was searched by itself
    assert set(program.accuracy) == set(program.loss) == set(TASKS)
    pair = [tiny_backbone("gpt_neox"), tiny_backbone("mamba2")]
    model = mw.compose("manticore", backbones=pair, num_blocks=2, mixture_weights=program.mixture_weights)
    assert torch.allclose(model.mixture_weights, rows.float())


def test_a_program_follows_from_its_seeds():
    first, again, other, both = (
        program_from_mad(["gpt_neox", "mamba2"], **small(tasks={"recall": TASKS["recall"]}, seeds=seeds))
        for seeds in ((0,), (0,), (1,), (0, 1))
    )
    assert first == again and first.mixture_weights != other.mixture_weights
    mean = (torch.tensor(first.mixture_weights) + torch.tensor(other.mixture_weights)) / 2
    assert torch.allclose(torch.tensor(both.mixture_weights), mean)


def test_components_that_cannot_read_the_context_take_no_part(monkeypatch):
    seen = []
    compose = programming.compose
    monkeypatch.setattr(
        programming, "compose", lambda config, models: seen.append(len(models)) or compose(config, models)
    )
    three = program_from_mad([NEOX, GPT_2, MAMBA], context=2048, **small())
    assert seen == [2, 2] and all(row[1] == 0.0 and row[0] > 0 for row in three.mixture_weights)
    alone = program_from_mad([NEOX, MAMBA], context=4096, **small())
    assert seen == [2, 2] and alone.mixture_weights == ((0.0, 1.0),) * 2  # nothing was trained for it


def test_small_components_fit_the_task_and_nothing_drops_out(monkeypatch):
    built = []
    build = programming.build_backbone
    monkeypatch.setattr(
        programming, "build_backbone", lambda *given, **more: built.append(build(*given, **more)) or built[-1]
    )
    llama = tiny_backbone("llama", max_position_embeddings=8)  # with a padding id, whose embedding would not learn
    given = tiny_backbone("gpt2", attn_pdrop=0.1)
    task = {"copy": SelectiveCopy(12, 20, 3, num_train=8)}
    program_from_mad([llama, given], shrink=False, **small(tasks=task, steps=1))
    first, second = (model.config for model in built)
    assert first.vocab_size == second.vocab_size == 12 and first.pad_token_id is None
    assert first.max_position_embeddings == 20 and second.n_positions == 512
    assert second.attn_pdrop == 0.0 and second.resid_pdrop == 0.0
    assert built[0].model.embed_tokens.padding_idx is None and first.hidden_size == llama.config.hidden_size


def test_the_rate_falls_over_the_steps_that_are_trained(monkeypatch):
    """The released code's schedule reached 0 after a fourteenth of them."""
    stages = []
    fit = programming.fit
    monkeypatch.setattr(
        programming, "fit", lambda model, stage, *rest, **more: stages.append(stage) or fit(model, stage, *rest, **more)
    )
    program_from_mad(["gpt_neox", "mamba2"], **small(tasks={"memory": TASKS["memory"]}, steps=40))
    (stage,) = stages
    assert stage.steps == 40 and stage.rate(29) == 1.0 and 0.0 < stage.rate(39) < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": ManticoreConfig(search="grid")}, "config.search=grid"),
        ({"config": ManticoreConfig(search="bilevel")}, "config.search=bilevel"),
        ({"tasks": {}}, "0 tasks"),
        ({"steps": 0}, "0 steps"),
        ({"seeds": ()}, "0 seeds"),
    ],
)
def test_what_cannot_be_programmed_from_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        program_from_mad(["gpt_neox", "mamba2"], **small(**settings))


def test_other_searches_find_weights_of_their_own():
    settings = ManticoreConfig(rows="block", learning_rate=2e-3)
    found = [
        program_from_mad(["gpt_neox", "mamba2"], config=replace(settings, search=search), **small()).mixture_weights
        for search in ("gaea", "gumbel")
    ]
    assert found[0] != found[1]


def test_the_tasks_it_is_programmed_from_are_five_and_short():
    assert len(SMALL) == 5 and max(task.length for task in SMALL.values()) <= 64
