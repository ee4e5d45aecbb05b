"""PEFT's Poly is the oracle: its adapters have the same outputs here, ours there; what it can't do, ours can."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from peft.tuners.poly.layer import Linear as PolyLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.experts.poly import PolyExperts
from mixwright.methods.tensorpoly.model import TaskComposedModel
from mixwright.methods.tensorpoly.peft_poly import export_peft_poly, from_peft_poly
from mixwright.ops.digest import tensor_digest
from mixwright.routers.task import TaskLogits
from mixwright.routing import Condition

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "t5": ["q", "v", "wo"], "bert": ["query", "output.dense"]}
TYPES = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": None}
TASKS = 3


def adapter(folder: Path, family: str = "llama", **settings: Any) -> Any:
    """A saved PEFT Poly adapter with random weights; PEFT's own model of it, in eval mode."""
    torch.manual_seed(1)
    config = PolyConfig(
        **{"r": 2, "n_tasks": TASKS, "n_skills": 4, "target_modules": TARGETS[family], "task_type": TYPES[family]}
        | settings
    )
    model = get_peft_model(tiny_backbone(family), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_lora" in name:
                parameter.normal_(std=0.3)
            elif "module_logits" in name:
                parameter.normal_(std=2.0)
    model.save_pretrained(folder)
    return model


def output(model: nn.Module, inputs: dict[str, Tensor], task_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, task_ids=task_ids)[0]


@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("family", ["llama", "t5", "bert"])
def test_a_peft_adapter_has_the_same_outputs_here(family: str, splits: int, tmp_path: Path) -> None:
    oracle = adapter(tmp_path / "poly", family, n_splits=splits)
    model = from_peft_poly(tmp_path / "poly", tiny_backbone(family))
    assert model.tasks == ("task-0", "task-1", "task-2") and model.experts == tuple(f"latent-{i}" for i in range(4))
    inputs = example_inputs(model.backbone) or {}
    seen = []
    for ids in ([0, 1], [2, 2], [1, 0]):
        ours, theirs = (output(m, inputs, torch.tensor(ids)) for m in (model, oracle.base_model))
        assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, theirs.abs().max().item())
        seen.append(theirs)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert {experts.positions for experts in latent(model)} == {None if splits == 1 else splits}


def latent(model: TaskComposedModel) -> list[PolyExperts]:
    return [mixture.experts for mixture in model.mixtures.values()]


def test_names_of_tasks_and_how_training_goes_on(tmp_path: Path) -> None:
    adapter(tmp_path / "poly", n_splits=2)
    model = from_peft_poly(tmp_path / "poly", tiny_backbone("llama"), ["rte", "copa", "cb"])
    inputs = example_inputs(model.backbone) or {}
    with model.with_task("copa"), torch.no_grad():
        named = model(**inputs)[0]
    assert torch.equal(named, output(model, inputs, torch.tensor([1, 1])))
    assert all(mixture.router.noise for mixture in model.mixtures.values())
    plain = from_peft_poly(tmp_path / "poly", tiny_backbone("llama"), noise=False)
    assert not any(mixture.router.noise for mixture in plain.mixtures.values())
    with pytest.raises(ValueError, match="2 names for 3 tasks"):
        from_peft_poly(tmp_path / "poly", tiny_backbone("llama"), ["rte", "copa"])


@pytest.mark.parametrize("splits", [1, 4])
def test_there_and_back(splits: int, tmp_path: Path) -> None:
    oracle = adapter(tmp_path / "poly", "t5", n_splits=splits)
    model = from_peft_poly(tmp_path / "poly", tiny_backbone("t5"))
    export_peft_poly(model, tmp_path / "back")
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("poly", "back"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    again = PeftModel.from_pretrained(tiny_backbone("t5"), tmp_path / "back").eval()
    inputs = example_inputs(model.backbone) or {}
    ids = torch.tensor([2, 0])
    assert torch.equal(output(again.base_model, inputs, ids), output(oracle.base_model, inputs, ids))


def test_a_saved_import_comes_back(tmp_path: Path) -> None:
    adapter(tmp_path / "poly", n_splits=4)
    tasks = ["rte", "copa", "cb"]
    model = mw.from_peft_poly(tmp_path / "poly", backbone=tiny_backbone("llama"), tasks=tasks, noise=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = mw.load(tmp_path / "saved", backbone=tiny_backbone("llama"))
    inputs = example_inputs(model.backbone) or {}
    ids = torch.tensor([2, 1])
    assert torch.equal(output(loaded, inputs, ids), output(model, inputs, ids))


def test_one_layer_equals_pefts_layer(tmp_path: Path) -> None:
    """Sheet, property 24: the layers themselves, given the same tensors, for every head count."""
    for heads in (1, 2, 4, 16):
        torch.manual_seed(heads)
        base = nn.Linear(32, 48).double()
        config = PolyConfig(r=3, n_tasks=5, n_skills=4, n_splits=heads, init_weights=False)
        theirs = PolyLinear(base, "default", config).double().eval()
        with torch.no_grad():
            theirs.poly_router["default"].module_logits.normal_(std=2)
        a, b = theirs.poly_lora_A["default"], theirs.poly_lora_B["default"]
        down, up = a.permute(1, 3, 0, 2).flatten(2), b.permute(1, 2, 0, 3).flatten(2)
        ours = PolyExperts(down.detach(), up.detach(), heads=heads)
        logits = theirs.poly_router["default"].module_logits.detach()
        router = TaskLogits(logits.unflatten(1, (heads, 4)) if heads > 1 else logits).eval()
        x, ids = torch.randn(6, 7, 32).double(), torch.tensor([4, 0, 2, 2, 1, 3])
        condition = Condition(task_ids=ids)
        found = base(x) + ours.eval()(x, router(x, condition), condition)
        torch.testing.assert_close(found, theirs(x, task_ids=ids), rtol=1e-12, atol=1e-12)


def test_beams_crash_in_peft_and_work_here(tmp_path: Path) -> None:
    oracle = adapter(tmp_path / "poly", "t5", n_splits=2)
    model = from_peft_poly(tmp_path / "poly", tiny_backbone("t5"))
    inputs = {"input_ids": torch.randint(4, 200, (2, 6), generator=torch.Generator().manual_seed(0))}
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ids = torch.tensor([0, 2])
    greedy = oracle.generate(**inputs, task_ids=ids, **options)
    assert torch.equal(model.generate(**inputs, task_ids=ids, **options), greedy)
    with pytest.raises(RuntimeError, match=r"batch2? tensor"):
        oracle.generate(**inputs, task_ids=ids, num_beams=3, **options)
    found = model.generate(**inputs, task_ids=ids, num_beams=3, **options)
    alone = [
        model.generate(inputs["input_ids"][row : row + 1], task_ids=ids[row : row + 1], num_beams=3, **options)
        for row in range(2)
    ]
    assert torch.equal(found, torch.cat(alone))


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def retouch(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


SITE = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type of Poly": ({"poly_type": "cpoly"}, r'^FEATURE .*poly_type="cpoly" is not supported'),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "^FEATURE .*modules_to_save="),
    "a LoRA": ({"peft_type": "LORA"}, r'^CONFIG .*peft_type is "LORA"; "POLY" is read here'),
    "no type": ({"peft_type": None}, "^CONFIG .*peft_type is"),
    "an unknown key": ({"n_skill": 4}, r'^CONFIG .*unknown key "n_skill".*Did you mean n_skills\?'),
    "rank zero": ({"r": 0}, "^RANK .*r is 0; a whole number from 1 to 512"),
    "a rank in text": ({"r": "2"}, "^RANK "),
    "half a task": ({"n_tasks": 2.5}, r"^CONFIG .*n_tasks is 2\.5"),
    "a pattern": ({"target_modules": ".*q_proj"}, "^TARGET .*a list of module names is accepted, no pattern"),
    "patterns in a list": ({"target_modules": ["(a+)+"]}, "^TARGET .*literal module names"),
    "a name of nothing": ({"target_modules": ["q_proj", "v_proj", "down_proj", "gate"]}, '^TARGET .*names "gate"'),
    "a layer left out": ({"target_modules": ["q_proj", "v_proj"]}, "^TENSOR .*target_modules does not name it"),
    "other skills": ({"n_skills": 5}, r"^SHAPE .*is \[1, 4, 48, 2\]; the configuration needs \[1, 5, 48, 2\]"),
    "other tasks": ({"n_tasks": 4}, r"^SHAPE .*module_logits is \[3, 4\]; the configuration needs \[4, 4\]"),
    "another base": ({"base_model_name_or_path": "other/model"}, "^BASE .*confirm_base=True"),
}
TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a backbone weight": (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "^TENSOR .*no part"),
    "a router less": (lambda t: t.pop(f"{SITE}.poly_router.module_logits"), "^INCOMPLETE .*has no poly_router"),
    "NaN": (lambda t: t[f"{SITE}.poly_lora_B"].fill_(torch.nan), "^VALUE .*NaN"),
    "doubles": (lambda t: t.update({f"{SITE}.poly_lora_A": t[f"{SITE}.poly_lora_A"].double()}), "^DTYPE "),
    "nothing": (lambda t: t.clear(), "^INCOMPLETE .*holds no Poly layer"),
    "half the layers": (
        lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name], "^INCOMPLETE .*3 layers .*have no tensors"
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter(tmp_path / "poly")
    return tmp_path / "poly"


def refused(folder: Path, message: str) -> None:
    backbone = tiny_backbone("llama")
    backbone.config._name_or_path = "tiny/llama"
    before = tensor_digest(backbone)
    with pytest.raises(CatalogError, match=message) as caught:
        from_peft_poly(folder, backbone)
    assert len(str(caught.value)) <= 400 and tensor_digest(backbone) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_configuration_asks_is_honoured_or_refused(name: str, folder: Path) -> None:
    changes, message = CONFIGS[name]
    rewrite(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_not_a_poly_adapter_are_refused(name: str, folder: Path) -> None:
    change, message = TENSORS[name]
    retouch(folder, change)
    refused(folder, message)


def test_another_backbone_is_refused(folder: Path) -> None:
    with pytest.raises(IncompatibleExpert, match="^TENSOR .*is no linear layer of this backbone"):
        from_peft_poly(folder, tiny_backbone("gpt_neox"))
    with pytest.raises(IncompatibleExpert, match="^SHAPE .*maps 48 -> 64 here; the adapter is for 48 -> 32"):
        from_peft_poly(folder, tiny_backbone("llama", hidden_size=64))
    with pytest.raises(CatalogError, match="^PATH "):
        from_peft_poly(folder / "missing", tiny_backbone("llama"))


def test_what_peft_does_not_know_is_not_exported(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tasks": ["a", "b"], "rank": 2}
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), **settings)
    with pytest.raises(ValueError, match="holds no Poly or MHR experts"):
        export_peft_poly(model, tmp_path / "poly")
    model = mw.compose("tensorpoly", backbone=tiny_backbone("gpt2"), experts="poly", **settings)
    with pytest.raises(ValueError, match=r"another kind than nn\.Linear"):
        export_peft_poly(model, tmp_path / "poly")
    settings |= {"experts": "poly", "straight_through": True}
    model = mw.compose("tensorpoly", backbone=tiny_backbone("llama"), **settings)
    with pytest.raises(ValueError, match="rounded routing"):
        export_peft_poly(model, tmp_path / "poly")
    assert list(tmp_path.iterdir()) == []
