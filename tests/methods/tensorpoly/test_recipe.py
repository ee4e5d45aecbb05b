"""Stage multitask and stage transfer from a recipe: what learns, at which rate, what is saved, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mixwright.training.fit as fitting
from mixwright import api
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.methods.tensorpoly.config import TensorPolyConfig
from mixwright.methods.tensorpoly.model import TaskComposedModel, compose
from mixwright.methods.tensorpoly.recipe import OF_TRAINING, stages
from mixwright.training.checkpoint import Checkpoints
from mixwright.training.optimizers import make_optimizers
from mixwright.training.run import TrainingReport
from mixwright.training.stage import select_parameters

FAMILY = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
SITES = {"causal": ["q_proj", "down_proj"], "seq2seq": ["q", "wo"], "encoder": ["query", "value"]}
KINDS = ("lora", "poly", "mhr", "tlora", "tensorpoly-1", "tensorpoly-2", "entangled")
SMALL = {"rank": 2, "num_latent": 3, "steps": 4, "transfer_steps": 2, "learning_rate": 0.05}
NAMES = ("a", "b", "c")


def rows(kind: str, name: str, count: int) -> list[dict[str, str]]:
    if kind == "encoder":
        return [
            {"text": f"{name} {n}", "label": ("rose", "leaf", "sky")[n % (2 + (name == "c"))]} for n in range(count)
        ]
    return [{"prompt": f"{name}{n}:", "completion": name * (n % 3 + 1)} for n in range(count)]


def recipe_for(folder: Path, kind: str = "causal", *, held_out: bool = False, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    tiny_backbone(FAMILY[kind]).save_pretrained(folder / "backbone")
    byte_tokenizer(kind).save_pretrained(folder / "backbone")
    for name, count in (("a", 6), ("b", 4), ("c", 9), ("new", 6)):
        (folder / name).mkdir(exist_ok=True)
        for split in ("train", "validation") if held_out else ("train",):
            (folder / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(kind, name, count))))
    return {
        "method": "tensorpoly",
        "backbone": str(folder / "backbone"),
        "output_dir": str(folder / "run"),
        "data": {"tasks": {name: str(folder / name) for name in NAMES}, "max_length": 24},
        "train": {"batch_size": 3, "log_every": 1},
        "config": {**SMALL, "target_modules": SITES[kind]},
        **changes,
    }


def transfer_to(folder: Path, *names: str, **config: Any) -> dict[str, Any]:
    """A recipe that carries what `recipe_for` trained in this folder over to new tasks."""
    return {
        "method": "tensorpoly",
        "backbone": str(folder / "backbone"),
        "output_dir": str(folder / "carried"),
        "composition": str(folder / "run" / "multitask" / "composition"),
        "data": {"new_tasks": {name: str(folder / "new") for name in names or ("new",)}, "max_length": 24},
        "config": {"transfer": "router", "start": "mean", **config},
    }


def train(recipe: dict[str, Any], **options: Any) -> TrainingReport:
    return api.train(recipe, quiet=True, **options)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return api.load(folder).added_state()


def same(one: Path, other: Path) -> bool:
    a, b = state_of(one), state_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("experts", "backbone"),
    [
        *((experts, "llama") for experts in KINDS),
        ("poly", "mixtral"),
        ("tensorpoly-1", "mixtral"),
    ],  # experts of its own
)
def test_groups_hold_every_trained_number_once_at_its_rate(experts: Any, backbone: str) -> None:
    latent = None if experts in ("lora", "tlora") else 2
    heads = 4 if experts == "mhr" else None
    config = TensorPolyConfig(tasks=("a", "b"), experts=experts, num_latent=latent, heads=heads, order=2)
    stage = stages(config)[0]
    model = compose(config, [tiny_backbone(backbone)])
    added = {tensor.data_ptr(): name for name, tensor in model.added_state().items()}
    learned = {name for name, p in model.named_parameters() if p.data_ptr() in added}
    chosen = select_parameters(model, stage.groups)
    names = [name for group in chosen for name in group]
    assert len(names) == len(set(names)) and set(names) == learned  # nothing missed, nothing twice
    rates = {
        id(p): group["peak"]
        for opt in make_optimizers(model, stage, chosen)
        for group in opt.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if name in learned:
            assert rates[id(parameter)] == (0.1 if name.endswith("logits") else 1e-3), name
    transfer = stages(config)[1]
    assert {name for group in select_parameters(model, transfer.groups) for name in group} == learned


@pytest.mark.parametrize("share", ["block", "model"])
def test_a_router_that_sites_share_learns_once(share: Any) -> None:
    config = TensorPolyConfig(tasks=("a", "b"), num_latent=2, rank=2, share=share)
    model = compose(config, [tiny_backbone("llama")])
    router = select_parameters(model, stages(config)[0].groups)[1]
    assert len(router) == {"block": 2, "model": 1}[share]


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_three_tasks_become_a_composition_that_loads_to_equal_outputs(kind: str, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, kind, held_out=True)
    report = train(recipe)
    folder = tmp_path / "run" / "multitask" / "composition"
    assert report.composition == str(folder) and report.tasks == {"a": 6, "b": 4, "c": 9}
    fitted = report.stages["multitask"]
    assert fitted.held_out.keys() == set(NAMES) and fitted.best is not None
    assert fitted.best[1] == pytest.approx(sum(fitted.held_out.values()) / 3)  # each task counts alike
    model, again = api.load(folder), api.load(folder)
    assert isinstance(model, TaskComposedModel) and model.tasks == NAMES
    inputs = {"input_ids": torch.arange(4, 16).reshape(3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.arange(4, 10).reshape(3, 2)
    with torch.no_grad(), model.with_task(list(NAMES)), again.with_task(list(NAMES)):
        one, other = model(**inputs)[0], again(**inputs)[0]
    with torch.no_grad(), model.disabled():
        bare = model(**inputs)[0]
    assert torch.equal(one, other) and (one - bare).abs().max() > 1e-4
    assert all(table.std(0).max() > 1e-4 for table in model.routing_table().values())  # tasks have parted


def test_the_log_has_losses_of_each_task_and_what_is_watched(tmp_path: Path) -> None:
    train(recipe_for(tmp_path, held_out=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "multitask" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all({"loss", "routing.usage", "routing.peakiness"} <= line.keys() for line in lines)
    assert {f"held_out_loss.{name}" for name in NAMES} <= lines[-1].keys()


@pytest.mark.parametrize("saves", [1, 4])
def test_a_cut_anywhere_resumes_to_the_same_bits(saves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = (
        recipe_for(tmp_path / "a", config={**SMALL, "noise": True, "target_modules": SITES["causal"]}),
        recipe_for(tmp_path / "b"),
    )
    cut["config"] = whole["config"]
    whole["train"] = cut["train"] = {"batch_size": 3, "checkpoint_every": 1}
    train(whole)
    done: list[int] = []
    plain = Checkpoints.save

    def stops(self: Checkpoints, snapshot: Any) -> Path:
        path = plain(self, snapshot)
        done.append(1)
        if len(done) == saves:
            raise OSError("the power goes")
        return path

    monkeypatch.setattr(fitting.Checkpoints, "save", stops)
    with pytest.raises(OSError, match="the power goes"):
        train(cut)
    monkeypatch.undo()
    folders = [tmp_path / x / "run" / "multitask" / "composition" for x in "ab"]
    assert not folders[1].exists()
    with pytest.raises(ValueError, match="holds a run that reached step-0000000.; continue it with resume"):
        train(cut)
    assert train(cut, resume=True).skipped == ()
    assert same(*folders)
    assert train(cut, resume=True).skipped == ("multitask",)  # once more does no harm
    with pytest.raises(ValueError, match="holds what stage multitask left.*resume"):
        train(cut)
    before = state_of(folders[1])
    train({**cut, "seed": 5}, force=True)
    assert any(not torch.equal(before[name], tensor) for name, tensor in state_of(folders[1]).items())


def test_a_new_task_is_carried_over_and_the_old_ones_keep_every_bit(tmp_path: Path) -> None:
    train(recipe_for(tmp_path))
    report = train(transfer_to(tmp_path))
    assert list(report.stages) == ["transfer"] and "new: trained router" in report.stages["transfer"].said
    old, new = (
        api.load(tmp_path / "run" / "multitask" / "composition"),
        api.load(tmp_path / "carried/transfer/composition"),
    )
    assert isinstance(old, TaskComposedModel) and isinstance(new, TaskComposedModel)
    assert new.tasks == (*NAMES, "new")
    for site, table in old.routing_table().items():
        assert torch.equal(new.routing_table()[site][:3], table)
    assert new.composition.config["steps"] == 4 and new.composition.config["transfer"] == "router"
    assert train(transfer_to(tmp_path), resume=True).skipped == ("transfer",)


def test_both_stages_in_one_recipe_are_the_same_as_one_after_another(tmp_path: Path) -> None:
    together, apart = recipe_for(tmp_path / "a"), recipe_for(tmp_path / "b")
    for folder, recipe in (("a", together), ("b", apart)):
        recipe["data"] = {**recipe["data"], "new_tasks": {"new": str(tmp_path / folder / "new")}}
        recipe["config"] = {**SMALL, "transfer": "all", "start": "fresh"}
    assert list(train(together).stages) == ["multitask", "transfer"]
    train(apart, stage="multitask"), train(apart, stage="transfer")
    assert same(*(tmp_path / x / "run" / "transfer" / "composition" for x in "ab"))


def test_training_goes_on_from_a_composition(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    train(recipe)
    first = tmp_path / "run" / "multitask" / "composition"
    onward = {**recipe, "composition": str(first), "output_dir": str(tmp_path / "more"), "config": {"steps": 3}}
    onward["data"] = {"tasks": {"c": str(tmp_path / "c"), "a": str(tmp_path / "a")}, "max_length": 24}  # ids by name
    train(onward)
    model = api.load(tmp_path / "more" / "multitask" / "composition")
    assert isinstance(model, TaskComposedModel) and model.tasks == NAMES and model.composition.config["rank"] == 2
    before, after = state_of(first), model.added_state()
    site = "model.layers.0.self_attn.q_proj"
    moved = (before[f"{site}.router.logits"] != after[f"{site}.router.logits"]).any(-1)
    assert moved.tolist() == [True, False, True] and not same(first, tmp_path / "more" / "multitask" / "composition")


def test_dry_run_says_what_each_group_trains_and_writes_nothing(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    recipe["data"] = {**recipe["data"], "new_tasks": {"new": str(tmp_path / "new")}}
    multitask, transfer = train(recipe, dry_run=True).plans
    assert multitask.groups["router"] == (4 * 3 * 3, 0.1) and multitask.groups["experts"][1] == 0.05
    assert multitask.trainable == sum(count for count, _ in multitask.groups.values()) and len(multitask.sites) == 4
    assert transfer.steps == 2 and not (tmp_path / "run").exists()


def test_faults_name_the_key(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    data = recipe["data"]

    def refused(match: str, stage: str | None = None, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            train({**recipe, **changes}, stage=stage)

    (tmp_path / "empty.jsonl").write_text("\n")
    tasks = data["tasks"]
    refused(
        r"recipe.data.tasks.d: .*gone.jsonl: no such file", data={"tasks": {**tasks, "d": f"{tmp_path}/gone.jsonl"}}
    )
    refused(
        r"recipe.data.tasks.d: .*empty.jsonl: no examples", data={"tasks": {**tasks, "d": f"{tmp_path}/empty.jsonl"}}
    )
    refused(r"recipe.data.tasks.c: config.tasks does not name it \(a, b\)", config={**SMALL, "tasks": ["a", "b"]})
    refused(
        r"recipe.data.new_tasks.a: data.tasks has a task of this name",
        data={**data, "new_tasks": {"a": "x"}} | {"new_tasks": tasks},
    )
    refused(r"recipe.data.tasks: data.train is given too", data={**data, "train": str(tmp_path / "a")})
    refused(r"recipe.data.tasks: empty", data={"tasks": {}})
    refused(r"recipe.data.validation: .* each task's own", data={**data, "validation": str(tmp_path / "a")})
    refused(r"recipe.expert: tensorpoly trains a whole composition", expert="e")
    refused(r"recipe.catalog: tensorpoly trains a whole composition", catalog="c")
    refused(r"recipe.data.new_tasks: missing; stage transfer", stage="transfer")
    refused(r"stage transfer starts from a trained composition", data={"new_tasks": {"n": str(tmp_path / "new")}})
    refused(r"recipe.data.train: missing", data={})
    with pytest.raises(ValueError, match=r"recipe.composition: phatgoose trains experts one at a time"):
        train({**recipe, "method": "phatgoose", "catalog": "c", "expert": "e", "config": {}, "composition": "x"})


def test_faults_of_a_start_are_named(tmp_path: Path) -> None:
    train(recipe_for(tmp_path))
    with pytest.raises(ValueError, match=r"Add `composition: .*multitask.composition` to the recipe"):
        train({**transfer_to(tmp_path), "composition": None, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ValueError, match=r"config.rank: the composition has 2 and the recipe 5"):
        train(transfer_to(tmp_path, rank=5))
    with pytest.raises(ValueError, match=r"'a' is one of the model's already"):
        train(transfer_to(tmp_path, "a"))
    with pytest.raises(ValueError, match=r"2 tasks, and config.transfer=all may train the experts that they share"):
        train(transfer_to(tmp_path, "x", "y", transfer="all"))
    assert train(transfer_to(tmp_path, "x", "y")).stages["transfer"].said.count("trained router") == 2
    stranger = {**recipe_for(tmp_path), "composition": transfer_to(tmp_path)["composition"]}
    stranger["data"] = {"tasks": {"d": str(tmp_path / "a")}}
    with pytest.raises(ValueError, match=r"recipe.data.tasks.d: config.tasks does not name it"):
        train(stranger, force=True)


def test_a_loss_that_is_not_finite_keeps_the_last_good_step_and_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage multitask, step \d.*not finite|nan|inf"):
        train(recipe_for(tmp_path, config={**SMALL, "learning_rate": 1e30, "steps": 20, "clip": 1e30}))
    run = tmp_path / "run" / "multitask"
    assert not (run / "composition").exists() and list((run / "checkpoints").iterdir())


def test_what_training_may_change_are_fields_of_the_config() -> None:
    assert set(TensorPolyConfig.__dataclass_fields__) >= OF_TRAINING


@pytest.mark.parametrize("kind", FAMILY)
def test_what_tasks_look_like_is_saved_with_them(tmp_path: Path, kind: str) -> None:
    train(recipe_for(tmp_path, kind))
    train(transfer_to(tmp_path))
    model, reader = api.load(tmp_path / "carried" / "transfer" / "composition"), byte_tokenizer(kind)
    with model.with_similar(["a 1", "b2:", "c"], tokenizer=reader) as guess:
        pass
    assert guess.tasks == (*NAMES, "new") and guess.similarity.isfinite().all()
    assert model.whole["task_features.count"].tolist() == [6, 4, 9, 6]
    train(recipe_for(tmp_path / "none", kind, train={"batch_size": 3, "signature_batches": 0}))
    assert not api.load(tmp_path / "none" / "run" / "multitask" / "composition").whole


def test_packed_text_is_remembered_as_it_was_trained_on(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path)
    for name in NAMES:
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": name * 60}))
    train(recipe)
    model = api.load(tmp_path / "run" / "multitask" / "composition")
    assert model.whole["task_features.count"].tolist() == [3, 3, 3]
    with model.with_similar(["bbbb"], tokenizer=byte_tokenizer()) as guess:
        assert guess.nearest == ("b",)
