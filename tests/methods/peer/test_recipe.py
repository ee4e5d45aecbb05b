"""Stages distil and pretrain from a recipe, in Python and on the command line: what learns, resumes, and is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mixwright.training.fit as fitting
from mixwright import api
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.cli import build
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.config import PeerConfig
from mixwright.methods.peer.model import compose
from mixwright.methods.peer.recipe import OF_TRAINING, stages
from mixwright.training.checkpoint import Checkpoints
from mixwright.training.run import TrainingReport
from mixwright.training.stage import select_parameters
from mixwright.yaml12 import write_yaml

FAMILY = {"causal": "llama", "seq2seq": "t5", "encoder": "bert"}
SMALL = {"num_experts": [8, 8], "heads": 2, "top_k": 4, "dim_key": 8, "steps": 4, "learning_rate": 0.02}


def rows(kind: str, count: int) -> list[dict[str, str]]:
    if kind == "encoder":
        return [{"text": f"text {n}", "label": ("rose", "leaf")[n % 2]} for n in range(count)]
    return [{"prompt": f"{c}:", "completion": c * 3} for c in "abcdefghijkl"[:count]]


def recipe_for(folder: Path, kind: str = "causal", *, held_out: bool = False, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    tiny_backbone(FAMILY[kind]).save_pretrained(folder / "backbone")
    byte_tokenizer(kind).save_pretrained(folder / "backbone")
    for name, count in (("train", 8), ("held-out", 4)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows(kind, count))))
    data = {"train": str(folder / "train.jsonl"), "max_length": 16}
    return {
        "method": "peer",
        "backbone": str(folder / "backbone"),
        "output_dir": str(folder / "run"),
        "data": data | ({"validation": str(folder / "held-out.jsonl")} if held_out else {}),
        "train": {"batch_size": 4, "log_every": 1},
        "config": SMALL,
        **changes,
    }


def train(recipe: dict[str, Any], **options: Any) -> TrainingReport:
    return api.train(recipe, quiet=True, **options)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return api.load(folder).added_state()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"row_dim": 4, "query_norm": "l2", "key_norm": "rms"}),
        ("llama", {"query_norm": "none", "shared_table": True, "sites": "all"}),
        ("mixtral", {"mode": "parallel"}),  # experts and a router of its own
        ("bert", {"preset": "memory_plus", "top_k": 4}),
        ("llama", {"output_gate": True, "row_dim": 4}),
    ],
)
def test_groups_hold_every_trained_number_once(family: str, settings: dict[str, Any]) -> None:
    config = PeerConfig(num_experts=64, distil_steps=0 if "mode" in settings else 3, **settings)
    model = compose(config, [tiny_backbone(family)])
    added = {tensor.data_ptr() for tensor in model.added_state().values()}
    learned = {name for name, p in model.named_parameters() if p.data_ptr() in added}
    for stage in stages(config):
        table, router = select_parameters(model, stage.groups)
        assert {*table, *router} == learned and not {*table} & {*router}
        assert all(".table." in name for name in table) and any("queries" in name for name in router)
        assert [group.lr for group in stage.groups] == [1e-3, 1e-3]
    assert [stage.name for stage in stages(config)] == (["pretrain"] if "mode" in settings else ["distil", "pretrain"])


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "encoder"])
def test_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    """Both stages, on backbones whose layers are one module or two halves; the backbone keeps every bit."""
    config = {**SMALL, "sites": "all", "distil_steps": 12, "learning_rate": 0.002}
    report = train(recipe_for(tmp_path, kind, held_out=True, config=config))
    assert list(report.stages) == ["distil", "pretrain"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/distil/log.jsonl").read_text().splitlines()]
    assert losses[0] > 1.5 and losses[-1] < losses[0]  # two sites, each about 1 where nothing is known
    folders = [tmp_path / "run" / stage / "composition" for stage in ("distil", "pretrain")]
    distilled, model = (api.load(folder) for folder in folders)
    assert isinstance(model, PeerComposedModel) and report.composition == str(folders[1])
    moved = [name for name, t in model.added_state().items() if not torch.equal(t, distilled.added_state()[name])]
    assert any("table.rows" in name for name in moved) and any("keys_first" in name for name in moved)
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, 16).reshape(3, 4)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.arange(4, 10).reshape(3, 2)
    with torch.no_grad(), model.disabled():
        bare = model(**inputs)[0]
    with torch.no_grad():
        assert torch.equal(bare, tiny_backbone(FAMILY[kind])(**inputs)[0])
        assert not torch.equal(bare, model(**inputs)[0])


def test_distilling_learns_what_the_layer_says(tmp_path: Path) -> None:
    """Enough experts, all of them retrieved: the layer of 48 neurons can be learned; padding counts for nothing."""
    config = {"num_experts": [8, 8], "heads": 4, "top_k": 16, "dim_key": 16, "distil_steps": 60, "steps": 1}
    recipe = recipe_for(tmp_path, config=config | {"learning_rate": 0.02, "query_norm": "layer"})
    report = train(recipe, stage="distil")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/distil/log.jsonl").read_text().splitlines()]
    assert report.stages["distil"].loss < 0.5 * losses[0]


def test_a_cut_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running statistics of the queries too, which are no parameters."""
    whole, cut = recipe_for(tmp_path / "a", held_out=True), recipe_for(tmp_path / "b", held_out=True)
    whole["train"] = cut["train"] = {"batch_size": 2, "accumulate": 2, "checkpoint_every": 1}
    train(whole)
    plain, done = Checkpoints.save, list[int]()

    def stops(self: Checkpoints, snapshot: Any) -> Path:
        path = plain(self, snapshot)
        done.append(1)
        if len(done) == 2:
            raise OSError("the power goes")
        return path

    monkeypatch.setattr(fitting.Checkpoints, "save", stops)
    with pytest.raises(OSError, match="the power goes"):
        train(cut)
    monkeypatch.undo()
    train(cut, resume=True)
    one, other = (state_of(tmp_path / x / "run" / "pretrain" / "composition") for x in "ab")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    steps = next(t for name, t in one.items() if name.endswith("norm.steps"))
    assert 0 < int(steps) <= 4  # one for each step of the optimiser, not for each pass; those of the best weights


def test_rows_learn_by_the_optimiser_that_is_asked_for(tmp_path: Path) -> None:
    """The exact lazy one leaves what AdamW leaves; row-wise Adagrad leaves something else."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("adamw", "lazy_adamw", "rowwise_adagrad"):
        train(recipe_for(tmp_path / name, config={**SMALL, "table_optimizer": name, "weight_decay": 0.1}))
        states[name] = state_of(tmp_path / name / "run" / "pretrain" / "composition")
    for key, tensor in states["adamw"].items():
        torch.testing.assert_close(states["lazy_adamw"][key], tensor, rtol=1e-4, atol=1e-6)
    rows = next(key for key in states["adamw"] if key.endswith("table.rows"))
    assert (states["rowwise_adagrad"][rows] - states["adamw"][rows]).abs().max() > 1e-4


def test_the_best_weights_come_with_their_statistics(tmp_path: Path) -> None:
    """What is held out is unlearned at once: what is kept is the model before the first step, statistics included."""
    recipe = recipe_for(tmp_path, held_out=True, config={**SMALL, "warmup": 0.0, "steps": 12})
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"prompt": "a:", "completion": "####"}))
    report = train(recipe)
    assert report.stages["pretrain"].best is not None and report.stages["pretrain"].best[0] == 0
    fresh = compose(PeerConfig(num_experts=(8, 8), heads=2, top_k=4, dim_key=8), [tiny_backbone("llama")])
    kept = state_of(tmp_path / "run" / "pretrain" / "composition")
    assert all(torch.equal(kept[name], tensor) for name, tensor in fresh.added_state().items())


def test_a_composition_trains_on_under_its_own_settings(tmp_path: Path) -> None:
    train(recipe_for(tmp_path))
    saved = tmp_path / "run" / "pretrain" / "composition"
    on = recipe_for(tmp_path, composition=str(saved), output_dir=str(tmp_path / "on"), config={"steps": 2})
    train(on)
    model = api.load(tmp_path / "on" / "pretrain" / "composition")
    assert isinstance(model, PeerComposedModel)
    assert model.settings.steps == 2 and model.settings.grid == (8, 8) and model.settings.heads == 2
    before = api.load(saved).added_state()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.added_state().items())
    with pytest.raises(ValueError, match="config.heads: the composition has 2 and the recipe 4.*start afresh"):
        train({**on, "output_dir": str(tmp_path / "other"), "config": {"heads": 4}})
    assert set(PeerConfig.__dataclass_fields__) >= OF_TRAINING


def test_beside_a_layer_there_is_nothing_to_distil(tmp_path: Path) -> None:
    config = {**SMALL, "mode": "parallel", "distil_steps": 2}
    with pytest.raises(ValueError, match="distil_steps=2: mode='parallel' keeps the layer"):
        train(recipe_for(tmp_path, config=config))
    with pytest.raises(ValueError, match="stage 'distil': expected one of pretrain"):
        train(recipe_for(tmp_path), stage="distil")


def run(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(build(), [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def test_from_end_to_end_on_the_command_line(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, held_out=True, config={**SMALL, "distil_steps": 2})
    path = tmp_path / "peer.yaml"
    path.write_text(write_yaml(recipe))
    assert "million single-neuron experts" in run("methods") and "he2024mixture" in run("cite", "peer")
    assert "num_experts" in run("schema", "peer")
    plan = run("train", path, "--dry-run")
    assert "table: 4,096 at rate 0.02" in plan and "Nothing was trained" in plan and not (tmp_path / "run").exists()
    assert "pretrain/composition" in run("train", path)
    assert "done before: distil, pretrain" in run("train", path, "--resume")
    composition = tmp_path / "run" / "pretrain" / "composition"
    table = run("eval", composition, "--data", tmp_path / "held-out.jsonl")
    assert "backbone" in table and "routed is" in table and "average" not in table
    said = run("run", composition, "--prompt", "a:", "--max-new-tokens", 3)
    assert re.search(r"\d tokens; \d+ of 64 experts acted", said)
    answer = json.loads(run("run", composition, "--prompt", "a:", "--max-new-tokens", 3, "--trace", "--json"))
    assert answer["experts"] == [] and answer["trace"]["sites"]
    assert run("explain", composition, "--text", "abc")
    fresh, base = tmp_path / "fresh", tmp_path / "backbone"
    made = run("compose", "--method", "peer", "--backbone", base, "--output", fresh, "--set", "num_experts=64")
    assert re.search(r"fresh: peer, [\d,]+ numbers at 1 sites", made) and (fresh / "composition.yaml").is_file()
