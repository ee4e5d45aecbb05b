"""A pool on disk: few bytes, the same weights to the bit, one backbone, and folders that strangers made."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.seen_tasks import SeenTasks
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.experts.sparse_deltas import SparseDeltas
from mixwright.methods.smat.config import SmatConfig
from mixwright.methods.smat.model import FewShotModel
from mixwright.methods.smat.packing import pack, unpack
from mixwright.methods.smat.stored import restore
from mixwright.ops.bits import pack_bits, unpack_bits
from mixwright.ops.hard_concrete import DEAD, LIMIT, mask
from mixwright.routing import SupportSet

from .pools import fresh_pool, moved

PACKED = "backbone.experts.packed."


def _model(**config: Any) -> FewShotModel:
    model = moved(fresh_pool(**{"experts": 8, **config}), spread=2.0, middle=-2.0)
    with torch.no_grad():
        multipliers = torch.rand(model.deltas.num_experts, generator=torch.Generator().manual_seed(1))
        model.deltas.multipliers.copy_(multipliers)
        model.router.temperature.fill_(0.5)
    return model


def _support(seed: int = 0) -> SupportSet:
    draw = torch.Generator().manual_seed(seed)
    return SupportSet(torch.randn(6, 3, 16, 16, generator=draw), torch.arange(3).repeat(2))


def _weights(model: FewShotModel, seed: int) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.weights_for(model.routing(_support(seed)))


def _load(folder: Path, backbone: nn.Module | None = None) -> FewShotModel:
    model = mw.load(folder, backbone=backbone or tiny_backbone("vit"))
    assert isinstance(model, FewShotModel)
    return model.eval()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_come_back(count: int) -> None:
    flags = torch.rand(3, count, generator=torch.Generator().manual_seed(count)) < 0.3
    packed = pack_bits(flags)
    assert packed.shape == (3, -(-count // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_bits(packed, count), flags)


def test_bits_beyond_the_end_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond the first 3"):
        unpack_bits(torch.tensor([0b1000], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="1 bytes are no 9 bits"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 9)


@pytest.mark.parametrize("granularity", ["weight", "row", "tensor"])
def test_what_is_loaded_serves_the_same_weights_to_the_bit(granularity: str, tmp_path: Path) -> None:
    model = _model(granularity=granularity)
    model.save_pretrained(tmp_path / "pool")
    again = _load(tmp_path / "pool")
    assert torch.equal(again.deltas.multipliers, model.deltas.multipliers)
    assert float(again.router.temperature) == 0.5
    for name in model.deltas.names:
        assert torch.equal(again.deltas.masks(name), model.deltas.masks(name))
    for seed in range(3):
        found, expected = _weights(again, seed), _weights(model, seed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("storage", ["exact", "compact"])
def test_saved_loaded_and_saved_again_is_the_same_bytes(storage: str, tmp_path: Path) -> None:
    _model(storage=storage).save_pretrained(tmp_path / "first")
    _load(tmp_path / "first").save_pretrained(tmp_path / "second")
    for file in ("added.safetensors", "composition.yaml", "experts.lock.json", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_compact_is_near_and_keeps_who_acts_where(tmp_path: Path) -> None:
    model = _model(storage="compact")
    model.save_pretrained(tmp_path / "pool")
    again = _load(tmp_path / "pool")
    assert torch.equal(again.sparsity(), model.sparsity())
    for name in model.deltas.names:
        found, expected = again.deltas.masks(name), model.deltas.masks(name)
        assert torch.equal(found == 0, expected == 0) and torch.equal(found == 1, expected == 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.006)
    found, expected = _weights(again, 0), _weights(model, 0)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0.003)


def test_the_ends_of_the_map_survive() -> None:
    """Logits exactly at, and one step to either side of, where the mask becomes 0 and 1."""
    edges = torch.tensor([DEAD, -DEAD])
    rows = torch.stack([edges, edges.nextafter(torch.tensor(9.0)), edges.nextafter(torch.tensor(-9.0))]).flatten()
    for storage in ("exact", "compact"):
        one, two = (SparseDeltas({"w": torch.Size([6])}, 2) for _ in range(2))
        with torch.no_grad():
            one.logits["w"].copy_(torch.stack([rows, rows.flip(0)]))
            one.delta["w"].fill_(1.0)
        unpack(two, pack(one, storage), storage)
        found, expected = mask(two.logits["w"]), mask(one.logits["w"])
        assert torch.equal(found == 0, expected == 0) and torch.equal(found == 1, expected == 1)
        assert storage == "compact" or torch.equal(found, expected)


def test_an_empty_and_a_full_pool() -> None:
    for value in (-3.0, 3.0, 0.25):
        one, two = (SparseDeltas({"w": torch.Size([5]), "b.c": torch.Size([0])}, 3) for _ in range(2))
        with torch.no_grad():
            one.logits["w"].fill_(value)
            one.delta["w"].fill_(2.0)
        unpack(two, pack(one))
        assert torch.equal(mask(two.logits["w"]), mask(one.logits["w"]))
        assert torch.equal(two.delta["w"], one.delta["w"] * (value > DEAD))


def test_dead_masks_come_back_at_the_end_of_their_range(tmp_path: Path) -> None:
    """As `packing` states: what a saved pool forgets, and from where further meta-tuning goes on."""
    model = _model()
    model.save_pretrained(tmp_path / "pool")
    again = _load(tmp_path / "pool")
    for key, logits in model.deltas.logits.items():
        found = again.deltas.logits[key]
        assert bool((found[logits <= DEAD] == -LIMIT).all()) and bool((found[logits >= -DEAD] == LIMIT).all())
        inside = (logits > DEAD) & (logits < -DEAD)
        assert torch.equal(found[inside], logits[inside])
        assert bool((again.deltas.delta[key][(logits <= DEAD).all(0)] == 0).all())


def test_a_pool_that_holds_nan_is_not_saved(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.deltas.logits["layernorm/weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layernorm\.weight: the pool holds NaN"):
        model.save_pretrained(tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_the_file_is_small(tmp_path: Path) -> None:
    """Against the dense pool; `benchmarks/pool_size.py` has it at the size of a ViT-S."""
    model = _model(storage="compact")
    model.save_pretrained(tmp_path / "pool")
    dense = sum(t.numel() * 4 for t in model.kept_tensors())
    assert (tmp_path / "pool" / "added.safetensors").stat().st_size < dense / 2


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_another_backbone_is_refused_by_the_bit_that_differs(what: str, tmp_path: Path) -> None:
    """Of a value that the fingerprint does not sample, or rounds away."""
    _model().save_pretrained(tmp_path / "pool")
    other = tiny_backbone("vit")
    if what == "buffer":
        other.register_buffer("running_mean", torch.zeros(3))
    else:
        with torch.no_grad():
            weight = other.get_parameter("layernorm.weight")
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    named = "the number of its tensors" if what == "buffer" else r"the tensor layernorm\.weight"
    with pytest.raises(IncompatibleExpert, match=f"^BASE .*first that differs is {named}"):
        _load(tmp_path / "pool", backbone=other)


def test_the_same_backbone_in_another_dtype_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "pool")
    assert _load(tmp_path / "pool", backbone=tiny_backbone("vit").to(torch.bfloat16)).backbone.dtype == torch.bfloat16


def test_a_pool_is_saved_whole_while_its_backbone_is_changed(tmp_path: Path) -> None:
    model = _model()
    model.save_pretrained(tmp_path / "before")
    with model.adapted(_support()):
        model.save_pretrained(tmp_path / "within")
    both = [(tmp_path / name / "added.safetensors").read_bytes() for name in ("before", "within")]
    assert both[0] == both[1]


Edit = Callable[[dict[str, Tensor]], object]


def _put(name: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda state: state.update({name: change(state[name]).contiguous()})


HOSTILE: dict[str, tuple[str, Edit]] = {
    "values cut off": ("SHAPE", _put(f"{PACKED}values", lambda t: t[:-1])),
    "values too many": ("SHAPE", _put(f"{PACKED}values", lambda t: torch.cat([t, t]))),
    "values of two axes": ("DTYPE", _put(f"{PACKED}values", lambda t: t[None])),
    "values of another dtype": ("DTYPE", _put(f"{PACKED}values", lambda t: t.double())),
    "values that are NaN": ("VALUE", _put(f"{PACKED}values", lambda t: t * float("nan"))),
    "union of another length": ("SHAPE", _put(f"{PACKED}union", lambda t: t[:-1])),
    "union of another dtype": ("SHAPE", _put(f"{PACKED}union", lambda t: t.long())),
    "union with other bits": ("SHAPE", _put(f"{PACKED}union", lambda t: t ^ 1)),
    "union that is a number": ("SHAPE", _put(f"{PACKED}union", lambda t: t[0])),
    "live of too few experts": ("SHAPE", _put(f"{PACKED}live", lambda t: t[:-1])),
    "live that is a row": ("SHAPE", _put(f"{PACKED}live", lambda t: t.flatten())),
    "live with other bits": ("SHAPE", _put(f"{PACKED}live", lambda t: t | 7)),
    "a weight without an expert": ("VALUE", _put(f"{PACKED}live", lambda t: t * 0)),
    "fractional cut off": ("SHAPE", _put(f"{PACKED}fractional", lambda t: t[:-1])),
    "fractional with other bits": ("SHAPE", _put(f"{PACKED}fractional", lambda t: t ^ 1)),
    "logits cut off": ("SHAPE", _put(f"{PACKED}logits", lambda t: t[1:])),
    "logits out of range": ("VALUE", _put(f"{PACKED}logits", lambda t: t + 9)),
    "logits that are NaN": ("VALUE", _put(f"{PACKED}logits", lambda t: t * float("nan"))),
    "logits as levels": ("DTYPE", _put(f"{PACKED}logits", lambda t: t.byte())),
    "another layout": ("CONFIG", _put(f"{PACKED}layout", lambda t: t ^ 1)),
    "layout of another size": ("CONFIG", _put(f"{PACKED}layout", lambda t: t[:3])),
    "a part missing": ("TENSOR", lambda state: state.pop(f"{PACKED}live")),
    "a part more": ("TENSOR", lambda state: state.update({f"{PACKED}more": torch.zeros(1)})),
    "a stranger": ("SHAPE", lambda state: state.update({"backbone.experts.stranger": torch.zeros(1)})),
    "a stranger elsewhere": ("TENSOR", lambda state: state.update({"elsewhere.router.x": torch.zeros(1)})),
    "dense masks as well": ("TENSOR", lambda s: s.update({"backbone.experts.delta.layernorm/bias": torch.zeros(32)})),
    "no keys": ("TENSOR", lambda state: state.pop("backbone.router.keys")),
    "keys of too few experts": ("TENSOR", _put("backbone.router.keys", lambda t: t[:-1])),
    "keys of another width": ("SHAPE", _put("backbone.router.keys", lambda t: t[:, :-4])),
    "no digests": ("TENSOR", lambda state: state.pop("whole.packed.base_sha256")),
    "digests of another shape": ("BASE", _put("whole.packed.base_sha256", lambda t: t[:, :9])),
    "digests of another backbone": ("BASE", _put("whole.packed.base_sha256", lambda t: t ^ 1)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "pool"
    _model(experts=3).save_pretrained(folder)
    return folder


def _forged(saved: Path, folder: Path, edit: Edit) -> Path:
    """A folder with other tensors whose digest is right: the forger wrote the lock as well."""
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(saved / "added.safetensors")
    edit(state)
    save_file(state, folder / "added.safetensors")
    _locked(folder)
    return folder


def _locked(folder: Path) -> None:
    data = (folder / "added.safetensors").read_bytes()
    lock = json.loads((folder / "experts.lock.json").read_text())
    lock["added"]["added.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "experts.lock.json").write_text(json.dumps(lock))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_forged_folder_is_one_refusal(case: str, saved: Path, tmp_path: Path) -> None:
    code, edit = HOSTILE[case]
    with pytest.raises(CatalogError) as refused:
        _load(_forged(saved, tmp_path / "forged", edit))
    assert refused.value.code == code and len(str(refused.value)) < 700


@pytest.mark.parametrize("at", [0, 5, 200, -1])
def test_a_file_that_is_cut_off_is_refused(at: int, saved: Path, tmp_path: Path) -> None:
    folder = _forged(saved, tmp_path / "cut", lambda state: None)
    data = (folder / "added.safetensors").read_bytes()
    (folder / "added.safetensors").write_bytes(data[:at])
    with pytest.raises(CatalogError, match="^HASH "):
        _load(folder)
    _locked(folder)
    with pytest.raises(CatalogError, match="^HEADER "):
        _load(folder)


def test_a_header_that_claims_more_than_there_is_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = _forged(saved, tmp_path / "huge", lambda state: None)
    data = (folder / "added.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = f"{PACKED}values"
    header[name]["shape"], header[name]["data_offsets"][1] = [1 << 40], header[name]["data_offsets"][0] + (1 << 42)
    text = json.dumps(header).encode()
    (folder / "added.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    _locked(folder)
    with pytest.raises(CatalogError, match="^HEADER "):
        _load(folder)


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("granularity", "row", "CONFIG"),
        ("exclude", ["layernorm.*"], "CONFIG"),
        ("include", ["nothing.*"], "CONFIG"),
        ("experts", 4, "TENSOR"),
        ("storage", "compact", "DTYPE"),
        ("storage", "tiny", "CONFIG"),
    ],
)
def test_another_config_is_refused(key: str, value: Any, code: str, saved: Path, tmp_path: Path) -> None:
    folder = _forged(saved, tmp_path / "forged", lambda state: None)
    stored = yaml.safe_load((folder / "composition.yaml").read_text())
    stored["config"][key] = value
    (folder / "composition.yaml").write_text(json.dumps(stored))
    with pytest.raises(CatalogError, match=f"^{code} "):
        _load(folder)


def test_a_small_file_with_a_billion_experts_takes_no_memory(saved: Path, tmp_path: Path) -> None:
    """A mask for each weight of so many experts would be terabytes of nothing, out of a small file."""
    count = 1 << 30
    state = load_file(saved / "added.safetensors")
    state["backbone.router.keys"] = torch.zeros(1, 1).expand(count, 1)
    state[f"{PACKED}live"] = torch.zeros(count, 0, dtype=torch.uint8)
    config = SmatConfig(experts=count)
    with pytest.raises(CatalogError, match="^SIZE .*1073741824 experts over 22496 weights take 89984 GiB"):
        restore(config, tiny_backbone("vit"), state, range(count))  # type: ignore[arg-type]


def test_an_unseen_pickle_is_never_opened(saved: Path, tmp_path: Path) -> None:
    folder = _forged(saved, tmp_path / "forged", lambda state: None)
    torch.save(nn.Linear(1, 1), folder / "added.safetensors")
    _locked(folder)
    with pytest.raises(CatalogError, match="^HEADER "):
        _load(folder)


def test_a_saved_pool_goes_on_learning(tmp_path: Path) -> None:
    """Gradients reach what a saved pool kept, and what it forgot stays as pretrained."""
    _model().save_pretrained(tmp_path / "pool")
    again = _load(tmp_path / "pool").train()
    theta = again.weights_for(again.routing(_support()))
    torch.stack([tensor.square().sum() for tensor in theta.values()]).sum().backward()
    key = "encoder/layer/0/output/dense/weight"
    key = key if key in again.deltas.delta else max(again.deltas.delta, key=lambda k: again.deltas.delta[k].numel())
    change, logits = again.deltas.delta[key], again.deltas.logits[key]
    assert change.grad is not None and logits.grad is not None
    assert bool((change.grad[(logits > DEAD).any(0)] != 0).any())
    assert bool((change.grad[(logits == -LIMIT).all(0)] == 0).all())
    assert bool((logits.grad != 0).any()) and again.router.keys.grad is not None


def test_the_card_says_what_the_pool_changes_and_what_it_was_tuned_on(tmp_path: Path) -> None:
    model = _model(experts=2)
    model.whole.update(
        SeenTasks.of([torch.zeros(3), torch.ones(3), torch.ones(3)], ["birds", "<b>", "birds"]).tensors()
    )
    model.save_pretrained(tmp_path / "pool")
    _, front, body = (tmp_path / "pool" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["mixwright", "smat", "mixture-of-experts"]
    for m, share in enumerate(model.sparsity().tolist()):
        assert f"| expert-{m} | {share:.1%} |" in body
    assert "- birds: 2 tasks remembered" in body and "- &lt;b>: 1 tasks remembered" in body
    assert "2 experts over 22,496 weights" in body and "## Where it may lose" in body
    _model(experts=2).save_pretrained(tmp_path / "plain")
    assert "Not recorded" in (tmp_path / "plain" / "README.md").read_text()
