"""What is written and read back: every kind of layer, what happened to it since, and what does not fit."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.inputs import example_inputs
from mixwright.composition.saving import ADDED
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.files import sha256_file
from mixwright.methods.peer.composed import PeerComposedModel
from mixwright.methods.peer.config import METHOD, PeerConfig
from mixwright.methods.peer.model import compose

SMALL: dict[str, Any] = {"num_experts": (8, 8), "heads": 2, "top_k": 4, "dim_key": 8, "sites": "all"}


def composed(family: str = "llama", **settings: Any) -> PeerComposedModel:
    return compose(PeerConfig(**(SMALL | settings)), [tiny_backbone(family)])


def output(model: nn.Module) -> Tensor:
    inputs = example_inputs(getattr(model, "backbone", model), 3)
    assert inputs is not None
    with torch.no_grad():
        return model(**inputs)[0]


def again(model: PeerComposedModel, folder: Path) -> PeerComposedModel:
    model.save_pretrained(folder)
    found = mw.load(folder, backbone=copy.deepcopy(model).remove())
    assert isinstance(found, PeerComposedModel)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "its keys apart": {"share_keys": False},
    "peer_pytorch": {"preset": "peer_pytorch", "top_k": None, "dim_key": None},
    "memory_plus": {"preset": "memory_plus"},
    "values": {"values_only": True},
    "gated": {"gated": True, "activation": "silu"},
    "narrow": {"row_dim": 8},
    "narrow and shared": {"row_dim": 8, "shared_table": True},
    "bfloat16": {"table_dtype": "bfloat16"},
    "rectangular": {"num_experts": (4, 16)},
    "past batch, key norm": {"query_norm": "past_batch", "key_norm": "rms"},
    "l2": {"query_norm": "l2", "key_norm": "l2", "gate": "sigmoid"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_the_same_after_loading(kind: str, tmp_path: Path) -> None:
    model = composed(**KINDS[kind]).eval()
    router, experts = next(iter(model.layers.values()))
    model.train()
    output(model)  # statistics of queries are no longer those of a fresh layer
    model.eval()
    found = again(model, tmp_path / "saved")
    assert torch.equal(output(found), output(model))
    assert found.settings == model.settings
    assert {n: t.dtype for n, t in found.added_state().items()} == {n: t.dtype for n, t in model.added_state().items()}
    kept, table = next(iter(found.layers.values()))
    assert (kept.grid, kept.heads, kept.top_k, kept.gate) == (router.grid, router.heads, router.top_k, router.gate)
    assert table.activation == experts.activation
    assert not any(t.is_meta for t in found.state_dict().values())
    beside = composed(mode="parallel", **KINDS[kind])
    assert torch.equal(output(beside), output(copy.deepcopy(beside).remove()))


def test_a_shared_table_is_one_and_is_written_once(tmp_path: Path) -> None:
    model = composed(shared_table=True)
    first, second = (experts.table for _, experts in model.layers.values())
    assert first is second and first.rows is second.rows
    found = again(model, tmp_path / "saved")
    with safe_open(tmp_path / "saved" / ADDED, "pt") as file:
        held = [name for name in file.keys() if name.endswith("table.rows")]  # noqa: SIM118  (not a mapping)
    assert held == ["model.layers.0.mlp.experts.table.rows"]
    first, second = (experts.table for _, experts in found.layers.values())
    assert first is second
    assert torch.equal(output(found), output(model))
    model(**example_inputs(model.backbone))[0].square().sum().backward()  # both sites teach the one table
    both = copy.deepcopy(model)
    assert len({id(experts.table) for _, experts in both.layers.values()}) == 1
    with pytest.raises(
        ValueError, match="shared_table: .* has the width 48, .* of the sites before it 32; set row_dim"
    ):
        compose(PeerConfig(**SMALL | {"shared_table": True, "sites": ("q_proj", "wide")}), [_two_widths()])


def _two_widths() -> nn.Module:
    class Wide(nn.Module):
        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.attention, self.into, self.wide, self.back = (
                attention,
                nn.Linear(32, 48),
                nn.Linear(48, 48),
                nn.Linear(48, 32),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.back(self.wide(self.into(x))))

    llama = tiny_backbone("llama")
    block = llama.get_submodule("model.layers.1")
    block.mlp = Wide(block.mlp)
    return llama


@torch.no_grad()
def test_what_happened_since_is_kept(tmp_path: Path) -> None:
    """Sub-keys that are kept out, neurons that are ablated, rows that are frozen, routers that are wrapped."""
    model = composed().eval()
    (router, experts), (other, _) = model.layers.values()
    router.bias_first[:, 5:] = -torch.inf
    other.bias_second[:, 2] = 0.5
    experts.table.frozen = torch.arange(64) < 9  # type: ignore[assignment]
    model.ablate([1, 2, 3])
    inputs = example_inputs(model.backbone, 5)
    thresholds = model.coverage_thresholds([inputs], 0.5)
    model.widen_unsure(thresholds, 8)
    found = again(model, tmp_path / "saved")
    assert torch.equal(output(found), output(model))
    (mine, table), (theirs, _) = found.layers.values()
    assert torch.equal(mine.bias_first, router.bias_first) and torch.equal(theirs.bias_second, other.bias_second)
    assert torch.equal(table.table.frozen, experts.table.frozen)
    assert torch.equal(theirs.ablated, other.ablated)
    wrapped = [type(mixture.router).__name__ for mixture in found.mixtures.values()]
    assert wrapped == ["WideningRouter", "WideningRouter"]
    before = output(found)
    found.retrieve_plainly()
    assert not torch.equal(output(found), before)


BREAKS: dict[str, tuple[str, str, Any]] = {
    "no keys": ("TENSOR", "sub-keys", lambda s: s.pop("model.layers.0.mlp.router.keys_second")),
    "no rows": ("TENSOR", "table.rows", lambda s: s.pop("model.layers.0.mlp.experts.table.rows")),
    "rows of another grid": (
        "SHAPE",
        "table.rows",
        lambda s: s.update({"model.layers.0.mlp.experts.table.rows": torch.zeros(63, 2, 32)}),
    ),
    "rows of another width": (
        "SHAPE",
        "table.rows",
        lambda s: s.update({"model.layers.0.mlp.experts.table.rows": torch.zeros(64, 2, 31)}),
    ),
    "keys of another width": (
        "SHAPE",
        "keys_first",
        lambda s: s.update({"model.layers.0.mlp.router.keys_first": torch.zeros(1, 8, 5)}),
    ),
    "too small a grid": (
        "SHAPE",
        "grid of 1 x 2",
        lambda s: s.update(
            {f"model.layers.0.mlp.router.keys_{n}": torch.zeros(1, i + 1, 4) for i, n in enumerate(("first", "second"))}
        ),
    ),
    "something more": ("TENSOR", "router.more", lambda s: s.update({"model.layers.0.mlp.router.more": torch.zeros(2)})),
    "another place": ("TENSOR", "no layer", lambda s: s.update({"model.layers.9.mlp.router.keys": torch.zeros(2)})),
    "nothing": ("TENSOR", "no tensor of any site", lambda s: s.clear()),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_tensors_that_do_not_fit_are_refused(fault: str) -> None:
    code, words, change = BREAKS[fault]
    model = composed(sites="layers.0")
    state = {name: tensor.clone() for name, tensor in model.added_state().items()}
    change(state)
    backbone = tiny_backbone("llama")
    with pytest.raises(CatalogError, match=words) as caught:
        METHOD.restore(model.settings, backbone, state, ())
    assert caught.value.code == code
    assert torch.equal(output(backbone), output(tiny_backbone("llama")))


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    model, folder = composed(), tmp_path / "saved"
    model.save_pretrained(folder)
    with pytest.raises(IncompatibleExpert, match="fingerprint"):
        mw.load(folder, backbone=tiny_backbone("llama", seed=1))
    with pytest.raises(CatalogError, match="names 1 experts; PEER's are neurons"):
        METHOD.restore(model.settings, tiny_backbone("llama"), model.added_state(), ("law",))
    data = bytearray((folder / ADDED).read_bytes())
    data[-5] ^= 1
    (folder / ADDED).write_bytes(bytes(data))
    with pytest.raises(CatalogError, match="HASH"):
        mw.load(folder, backbone=tiny_backbone("llama"))


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    composed(licence="MIT").save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text()
    assert "# peer on LlamaForCausalLM" in text and "go by number. Their licence: MIT." in text
    assert "num_experts" in text and "he2024mixture" in text
    assert "lora" not in text and "0 experts" not in text and "license: mit" in text
    lock = json.loads((tmp_path / "saved" / "experts.lock.json").read_text())
    assert lock["experts"] == [] and lock["added"][ADDED]["sha256"] == sha256_file(tmp_path / "saved" / ADDED)


def test_pushing_uploads_one_folder() -> None:
    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> None:
            self.repo = repo_id

        def upload_folder(self, *, folder_path: str, **_: Any) -> str:
            self.files = sorted(path.name for path in Path(folder_path).iterdir())
            return "commit"

    hub = Hub()
    assert composed().push_to_hub("me/peer", client=hub) == "commit"
    assert hub.files == ["README.md", "added.safetensors", "composition.yaml", "experts.lock.json"]


def test_experts_without_names() -> None:
    model = composed()
    assert model.experts == () and model.active == ()
    model.set_active(None)
    for call in (lambda: model.set_active(["law"]), lambda: model.index("law"), lambda: model.only("law").__enter__()):
        with pytest.raises(ValueError, match="no expert 'law' in this model; it has none with names"):
            call()
    with pytest.raises(ValueError, match="no linear layer with low-rank experts; only those fold"):
        model.fold()


def test_on_the_meta_device_nothing_is_drawn_or_held() -> None:
    with torch.device("meta"):
        backbone = tiny_backbone("llama")
    model = compose(PeerConfig(num_experts=1024**2, sites="all", mode="parallel"), [backbone])
    assert all(tensor.is_meta for tensor in model.added_state().values())
    assert model.num_added_parameters() > 2 * 2 * 32 * 1024**2


def test_first_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = composed(seed=3).added_state()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other, third = composed(seed=3).added_state(), composed(seed=4).added_state()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [name for name in one if name.endswith(("table.rows", "keys_first", "queries.weight"))]
    assert not any(torch.equal(one[name], third[name]) for name in rows)
    assert not torch.equal(*(one[name] for name in rows if name.endswith("rows")))  # sites are drawn apart


@pytest.mark.parametrize("mode", ["replace", "parallel"])
def test_in_bfloat16(mode: str, tmp_path: Path) -> None:
    model = composed(mode=mode).eval()
    wide = output(model)
    model.bfloat16()
    narrow = output(model)
    assert narrow.dtype == torch.bfloat16 and (narrow.float() - wide).abs().max() < 0.05
    assert torch.equal(output(again(model, tmp_path / "saved")), narrow)
    backbone = tiny_backbone("llama").bfloat16()
    fresh = compose(PeerConfig(**SMALL, mode=mode), [backbone])  # type: ignore[arg-type]
    assert output(fresh).dtype == torch.bfloat16
    assert {p.dtype for n, p in fresh.named_parameters() if ".table." in n} == {torch.float32}


def test_settings_that_do_not_fit_are_refused() -> None:
    for settings, words in (
        ({"num_experts": 10}, "num_experts=10: expected a square number, such as 9 or 16, or a grid"),
        ({"num_experts": (0, 4)}, "num_experts=.*expected 1 or more"),
        ({"num_experts": 4, "top_k": 5}, "top_k=5: expected at most the 4 experts"),
        ({"dim_key": 7}, "dim_key=7: expected an even number"),
        ({"heads": 0}, "heads=0: expected a whole number of at least 1"),
        ({"sites": ()}, "sites: expected"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected more than 0"),
        ({"warmup": 0.7, "cooldown": 0.7}, "together <= 1"),
        ({"gated": True, "values_only": True}, "one row and nothing to gate"),
        ({"mode": "parallel", "distil_steps": 5}, "nothing to teach"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            PeerConfig(**settings)
    with pytest.raises(ValueError, match="peer config.heds: unknown key; did you mean 'heads'"):
        mw.compose("peer", backbone=tiny_backbone("llama"), heds=3)
    with pytest.raises(ValueError, match="goes from width 32 to 16"):
        mw.compose("peer", backbone=tiny_backbone("llama"), sites="k_proj", num_experts=64)
    backbone = tiny_backbone("llama")
    with pytest.raises(ValueError, match="give no catalogue"):
        compose(PeerConfig(), [backbone, backbone])


@pytest.mark.parametrize("settings", [{}, {"shared_table": True}, {"share_keys": False, "row_dim": 8}])
def test_grown_models_are_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    model = composed(**settings).eval()
    before = output(model)
    ids = model.grow(2, zero_out=False)
    assert ids == dict.fromkeys(model.mixtures, range(64, 80))
    assert torch.equal(output(model), before)  # who waits is not heard
    waiting = again(model, tmp_path / "waiting")
    assert torch.equal(output(waiting), before)
    waiting.admit()
    model.admit()
    assert torch.equal(output(waiting), output(model))
    assert torch.equal(output(again(model, tmp_path / "admitted")), output(model))
    with pytest.raises(ValueError, match="no site 'mlp'; there are model.layers.0.mlp"):
        model.grow(1, "mlp")


def test_one_site_grows_alone(tmp_path: Path) -> None:
    model = composed().eval()
    model.grow(1, "model.layers.1.mlp")
    model.reserve_slots(2, "model.layers.1.mlp")
    grids = [router.grid for router, _ in model.layers.values()]
    assert grids == [(8, 8), (9, 8)]
    found = again(model, tmp_path / "saved")
    assert [router.grid for router, _ in found.layers.values()] == grids
    assert torch.equal(output(found), output(model))
