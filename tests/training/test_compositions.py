"""The pipeline of compositions, whatever the method: nothing trained is lost, nothing is left installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.mixture import Mixture
from mixwright.composition.model import ComposedModel
from mixwright.data.tasks import Example, TextTask
from mixwright.experts.lora import LoraExperts
from mixwright.recipe import BackboneConfig, DataConfig, Recipe, TrainConfig
from mixwright.routers.constant import ConstantRouter
from mixwright.training.compositions import train_composition
from mixwright.training.job import Job, open_job
from mixwright.training.run import Request
from mixwright.training.sources import Texts
from mixwright.training.stage import ParamGroup, Stage

SITE = "model.layers.0.self_attn.q_proj"
EXPERTS = ParamGroup(select=("*.experts.down", "*.experts.up"), lr=0.1, name="experts")


def composed(backbone: nn.Module, seed: int = 0, before: ComposedModel | None = None) -> ComposedModel:
    """One LoRA at one site, from `before` on."""
    if before is not None:
        return before
    draw = torch.Generator().manual_seed(seed)
    factor = (torch.randn(2, 32, generator=draw), torch.zeros(32, 2), 1.0)
    mixture = Mixture(backbone.get_submodule(SITE), ConstantRouter(torch.ones(1)), LoraExperts.stack([factor]))
    return ComposedModel(backbone, {SITE: mixture}, ("one",))


def job_in(folder: Path) -> Job:
    task = TextTask("t", "prompt", tuple(Example(f"{c}:", target=c * 3) for c in "abcd"))
    recipe = Recipe(
        backbone=BackboneConfig(path="none"),
        output_dir=str(folder),
        train=TrainConfig(batch_size=2),
        data=DataConfig(max_length=16),
    )
    texts = Texts(train=(task,), validation=(), new_tasks={}, mixed=False)
    return open_job(recipe, texts, tiny_backbone("llama"), byte_tokenizer())


def back(folder: str, backbone: nn.Module) -> ComposedModel:
    """The stored LoRA on its backbone, as a method's `restore` would put it."""
    from safetensors.torch import load_file

    model = composed(backbone)
    stored = load_file(f"{folder}/added.safetensors")
    with torch.no_grad():
        for name, tensor in model.added_state().items():
            tensor.copy_(stored[name])
    return model


def stage(name: str, **changes: Any) -> Stage:
    settings: dict[str, Any] = {"groups": (EXPERTS,), "steps": 2, "warmup": 0.0, "build": composed}
    return Stage(**{"name": name, **settings, **changes})


def trained(folder: Path, *stages: Stage, **options: Any) -> Any:
    job = job_in(folder)
    before = {name: p.clone() for name, p in job.backbone.named_parameters()}
    try:
        return train_composition(job, stages, back, Request(quiet=True, **options))
    finally:
        after = dict(job.backbone.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert type(job.backbone.get_submodule(SITE)) is nn.Linear


def added(folder: Path) -> bytes:
    return (folder / "composition" / "added.safetensors").read_bytes()


def test_a_stage_starts_from_what_the_one_before_left(tmp_path: Path) -> None:
    report = trained(tmp_path / "a", stage("one"), stage("two"))
    assert list(report.stages) == ["one", "two"] and report.composition == str(tmp_path / "a" / "two" / "composition")
    trained(tmp_path / "b", stage("one"))
    trained(tmp_path / "b", stage("one"), stage("two"), only="two")
    assert added(tmp_path / "a" / "two") == added(tmp_path / "b" / "two") != added(tmp_path / "a" / "one")


def test_a_stage_that_changed_is_not_taken_for_done_nor_one_whose_start_changed(tmp_path: Path) -> None:
    trained(tmp_path, stage("one"), stage("two"))
    assert trained(tmp_path, stage("one"), stage("two"), resume=True).skipped == ("one", "two")
    (tmp_path / "one" / "composition" / "added.safetensors").write_bytes(b"other")  # damaged: made again
    assert trained(tmp_path, stage("one"), stage("two"), resume=True).skipped == ("two",)
    trained(tmp_path, stage("one", steps=3), only="one", force=True)
    with pytest.raises(ValueError, match="different run: composition was"):
        trained(tmp_path, stage("one", steps=3), stage("two"), only="two", resume=True)


def test_what_would_not_be_saved_is_not_trained(tmp_path: Path) -> None:
    everything = ParamGroup(select=("*",), lr=0.1)
    with pytest.raises(AssertionError, match=r"stage one trains backbone\..*, which is not saved"):
        trained(tmp_path, stage("one", groups=(everything,)))


def test_a_build_that_fails_leaves_the_backbone_bare(tmp_path: Path) -> None:
    def refuses(backbone: nn.Module, seed: int, before: ComposedModel | None) -> ComposedModel:
        del backbone, seed
        assert before is not None
        raise ValueError("not like this")

    for options in ({}, {"dry_run": True}):
        with pytest.raises(ValueError, match="not like this"):
            trained(tmp_path / str(len(options)), stage("one"), stage("two", build=refuses), **options)
    with pytest.raises(ValueError, match="stage one builds a LlamaForCausalLM; expected a composed model"):
        trained(tmp_path / "c", stage("one", build=lambda backbone, seed, before: backbone))
    with pytest.raises(ValueError, match=r"recipe.data.new_tasks: missing; stage few learns from it"):
        trained(tmp_path / "d", stage("one"), stage("few", data="new_tasks"), only="few")
