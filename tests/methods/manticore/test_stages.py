"""All stages of one recipe on a tiny pair: what each proves, what each leaves, how it resumes, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mixwright.training.fit as fitting
from mixwright import api
from mixwright.methods.manticore.gates import align_gates, discretise_gates, search_gates
from mixwright.methods.manticore.losses import Reference
from mixwright.methods.manticore.rewinding import component_digests, pretrained_digests, rewound
from mixwright.training.update import Updater

from .pair import NAMES, components, config_of, findings, folders, recipe_in, record, train

ALL = ("inspect", "align", "search", "tune", "discretise", "evaluate")
TRAINED = ("align", "search", "tune", "discretise")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage, in one recipe."""
    folder = tmp_path_factory.mktemp("whole")
    report = train(recipe_in(folder, num_blocks=2, discretise_steps=2))
    assert tuple(report.stages) == ALL
    assert report.composition == str(folder / "run" / "discretise" / "composition")
    assert "Hand over" in report.stages["evaluate"].said or "fallback" in report.stages["evaluate"].said
    return folder


def tensors(folder: Path, stage: str, run: str = "run") -> dict[str, torch.Tensor]:
    """Everything that a stage left: added tensors, and trained components."""
    left = folder / run / stage / "composition"
    files = {path.relative_to(left).as_posix(): load_file(path) for path in left.rglob("*.safetensors")}
    return {f"{file}:{name}": tensor for file, found in files.items() for name, tensor in found.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_comes_out_loads_and_generates(whole: Path) -> None:
    inputs = torch.tensor([[10, 20, 30, 40]])
    for stage in ("tune", "discretise"):
        model: Any = api.load(whole / "run" / stage / "composition")
        out = model.generate(input_ids=inputs, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > 4 and torch.isfinite(model(input_ids=inputs).logits).all()
        assert not any(name.startswith("aligned") for name in model.whole)  # kept for rewinding, and no longer
    assert ((model.mixture_weights == 0) | (model.mixture_weights == 1)).all()
    assert model.embedding_weights.max() == 1 and model.head_weights.max() == 1


def test_what_must_stand_still_is_proved_by_digest(whole: Path) -> None:
    found = {stage: findings(whole, stage) for stage in TRAINED}
    pretrained = pretrained_digests(NAMES, components(whole))
    for stage in TRAINED:
        assert (record(whole, stage)["frozen"]["parameters"] > 0) == (stage != "search"), stage
        assert found[stage]["pretrained"] == pretrained, stage
    assert found["align"]["components_at_start"] == found["align"]["components_at_end"] == pretrained
    searched = found["search"]["components_at_end"]
    assert all(searched[name] != pretrained[name] for name in NAMES)  # it trains everything, in the paper's way
    assert found["tune"]["components_at_start"] == pretrained  # rewound, to the byte
    assert found["tune"]["mixture_weights_at_start_sha256"] == found["tune"]["mixture_weights_sha256"]
    assert found["tune"]["mixture_weights_sha256"] == found["search"]["mixture_weights_sha256"]
    assert found["search"]["mixture_weights_at_start_sha256"] != found["search"]["mixture_weights_sha256"]


def test_rewinding_brings_back_what_align_left(whole: Path) -> None:
    pristine = components(whole)
    aligned: Any = api.load(whole / "run" / "align" / "composition")
    searched: Any = api.load(whole / "run" / "search" / "composition")
    fresh = rewound(searched, pristine)
    assert component_digests(fresh) == pretrained_digests(NAMES, pristine) != component_digests(searched)
    for slot, mixture in fresh.mixtures.items():
        for name, tensor in mixture.experts.state_dict().items():
            assert torch.equal(tensor, aligned.mixtures[slot].experts.state_dict()[name]), name
        for name, tensor in mixture.router.state_dict().items():
            assert torch.equal(tensor, searched.mixtures[slot].router.state_dict()[name]), name
    moved = searched.mixtures["blocks.0"].experts.state_dict()
    assert any(not torch.equal(t, moved[n]) for n, t in fresh.mixtures["blocks.0"].experts.state_dict().items())
    given = {id(p) for component in pristine for p in component.parameters()}
    assert not any(id(p) in given for p in fresh.parameters())  # on copies: those given stay as they are


def test_one_by_one_and_cut_off_it_comes_to_the_same_bits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        shutil.copytree(whole / name, tmp_path / name)
    recipe = recipe_in(tmp_path, num_blocks=2, discretise_steps=2)
    recipe["backbones"] = folders(whole)  # the same paths: they stand in what is saved
    recipe["train"]["checkpoint_every"] = 1
    train(recipe, stage="align")
    step = Updater.step

    def cut(self: Updater, number: int) -> float:
        if number == 1:
            raise RuntimeError("the power goes")
        return step(self, number)

    monkeypatch.setattr(fitting.Updater, "step", cut)
    with pytest.raises(RuntimeError, match="the power goes"):
        train(recipe, stage="search")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "search" / "composition").exists()
    train(recipe, stage="search", resume=True)
    assert train(recipe, stage="search", resume=True).skipped == ("search",)
    train(recipe, stage="tune")
    for stage in ("align", "search", "tune"):
        assert same(tensors(whole, stage), tensors(tmp_path, stage)), stage


def test_the_weights_path_is_in_the_log(whole: Path) -> None:
    lines = (whole / "run" / "search" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(f'"weight.blocks.1.{name}"' in line for line in lines for name in NAMES)


def test_evaluate_names_a_verdict_a_fallback_and_what_was_compared(whole: Path) -> None:
    found = findings(whole, "evaluate")
    systems = {row["system"]: row for row in found["systems"]}
    assert found["decided_on"] == "test" and found["chosen_on"] == "validation"
    both = {f"{name} ({budget})" for name in NAMES for budget in ("no tuning", "equal tokens")}
    assert set(systems) == {"hybrid", "soft hybrid", "logit ensemble"} | both
    alone = {name: row["loss"]["validation"] for name, row in systems.items() if row["kind"] == "component"}
    assert found["fallback"] == min(alone, key=lambda name: alone[name])
    assert found["hand_over"] == ("hybrid" if found["verdict"]["verdict"] == "better" else found["fallback"])
    assert systems["hybrid"]["parameters"] < systems["soft hybrid"]["parameters"]
    assert systems["hybrid"]["flops_per_token"] < systems["soft hybrid"]["flops_per_token"]
    alone = [systems[f"{name} (equal tokens)"]["flops_per_token"] for name in NAMES]
    assert systems["logit ensemble"]["flops_per_token"] <= sum(alone) < systems["soft hybrid"]["flops_per_token"]
    rivals = {one["rival"] for one in found["verdicts"]}
    assert {"logit ensemble", "soft hybrid", found["fallback"]} <= rivals


def test_a_failed_gate_stops_where_it_is_told_to(tmp_path: Path) -> None:
    hard = recipe_in(tmp_path, gates="stop")
    hard["data"]["max_length"] = 600
    for options in ({}, {"stage": "align"}):  # at once; and for a stage of another day
        with pytest.raises(ValueError, match=r"stage inspect: data.max_length 600 > 512, the context limit of neox"):
            train(hard, **options)
    assert not (tmp_path / "run" / "align").exists()
    gates = {gate["name"]: gate["passed"] for gate in record(tmp_path, "inspect")["gates"]}
    assert gates == {"licences": True, "tokenizers": True, "context": False, "identity": True}
    assert findings(tmp_path, "inspect")["cost"]["flops_per_token"] > 0


def test_gates_compare_with_the_best_component_and_the_ensemble() -> None:
    others = Reference({"neox": 2.0, "mamba": 3.0}, 1.9)
    config = config_of(align_tolerance=0.25)
    assert [gate.passed for loss in (2.25, 2.26) for gate in align_gates(loss, others, config)] == [True, False]
    assert "2.2600 > 2.2500, the loss of neox alone + 0.25" in align_gates(2.26, others, config)[0].said
    assert [gate.passed for gate in search_gates(1.95, others)] == [True, False]
    assert [gate.passed for gate in search_gates(None, None)] == [None, None]
    assert [gate.passed for loss in (2.1, 2.2) for gate in discretise_gates(loss, 2.0, config)] == [True, False]


def test_nothing_starts_from_what_was_never_aligned_or_found(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, inspect=False)
    for stage, message in (
        ("search", "stage search starts from an aligned hybrid: run stage align first"),
        ("tune", "stage tune starts from mixture weights that were found"),
        ("evaluate", "stage evaluate compares what was trained"),
    ):
        with pytest.raises(ValueError, match=message):
            train(recipe, stage=stage)


def test_programmed_weights_go_straight_to_tune_and_stay(tmp_path: Path) -> None:
    programmed = recipe_in(tmp_path, splits=("train",), mixture_weights=[[0.25, 0.75]], evaluate=False, inspect=False)
    report = train(programmed)
    assert tuple(report.stages) == ("align", "tune")
    model: Any = api.load(tmp_path / "run" / "tune" / "composition")
    assert torch.allclose(model.mixture_weights, torch.tensor([[0.25, 0.75]]))
    assert record(tmp_path, "align")["gates"][0]["passed"] is None  # no data.validation: said, not passed over
    found = findings(tmp_path, "tune")
    assert found["mixture_weights_at_start_sha256"] == found["mixture_weights_sha256"]
    assert found["components_at_start"] == found["pretrained"]
