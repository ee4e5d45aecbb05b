"""What a catalogue promises its callers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mixwright.catalog.adapter import LoraFactors
from mixwright.catalog.fit import fit
from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError, IncompatibleExpert
from mixwright.sites import linear_sites


def refused(code: str) -> Any:
    return pytest.raises(CatalogError, match=f"^{code} ")


def some_factors(rank: int = 2) -> dict[str, LoraFactors]:
    torch.manual_seed(rank)
    return {f"layers.{i}.q_proj": LoraFactors(torch.randn(rank, 8), torch.randn(8, rank), 0.5) for i in range(2)}


def test_the_copy_is_the_bytes_that_were_checked(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    source = specimen().write(tmp_path / "x")
    (source / "README.md").write_text("not an adapter's file")
    (source / "optimizer.pt").write_bytes(b"not taken")
    catalog.add(source, licence="mit", task="law")
    stored = catalog.folder / "experts" / "x"
    assert {path.name for path in stored.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "card.json"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (stored / name).read_bytes() == (source / name).read_bytes()
    card = catalog.card("x")
    assert (card.licence, card.task, card.rank, card.source.name) == ("mit", "law", 4, "x")
    assert card.backbone == catalog.backbone.fingerprint and len(card.sites) == 6  # type: ignore[union-attr]


def test_states(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    for name in "abc":
        catalog.add(specimen().write(tmp_path / name))
    catalog.disable("b")
    catalog.disable("b")
    catalog.retire("c")
    assert catalog.ids() == ("a",) and catalog.ids(active=False) == ("a", "b", "c")
    assert catalog.states() == {"a": "active", "b": "disabled", "c": "retired"}
    with refused("STATE"):
        catalog.enable("c")
    with refused("STATE"):
        catalog.restore("b")
    catalog.enable("b")
    catalog.restore("c")
    assert [card.id for card in catalog.cards()] == ["a", "b", "c"]
    for verb in ("disable", "enable", "retire", "restore", "remove", "card", "expert", "check"):
        with refused("MISSING"):
            getattr(catalog, verb)("nobody")


def test_remove_and_add_back_is_the_start(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    source = specimen().write(tmp_path / "x")
    catalog.add(source)
    before = catalog.expert("x")
    catalog.disable("x")
    catalog.remove("x")
    assert catalog.ids(active=False) == () and not (catalog.folder / "experts" / "x").exists()
    catalog.add(source)
    after = catalog.expert("x")
    assert catalog.states() == {"x": "active"}
    for path, factor in before.factors.items():
        assert torch.equal(factor.down, after.factors[path].down) and torch.equal(factor.up, after.factors[path].up)


def test_ids(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    source = specimen().write(tmp_path / "x")
    catalog.add(source)
    with refused("EXISTS"):
        catalog.add(source)
    for bad in ("../x", "a/b", ".hidden", "", "a b", "x" * 65, "backbone", "é", "a\n"):
        with refused("NAME"):
            catalog.publish(bad, some_factors(), peft_config={})
    for bad in ("../x", "experts", "."):
        with refused("MISSING"):
            catalog.card(bad)


def test_dry_run_changes_nothing(tmp_path: Path, backbone: nn.Module, specimen: Any) -> None:
    catalog = Catalog(tmp_path / "catalogue", backbone)
    source = specimen().write(tmp_path / "x")
    assert catalog.add(source, dry_run=True).rank == 4
    assert not catalog.folder.exists()
    catalog.add(source)
    with refused("EXISTS"):
        catalog.add(source, dry_run=True)


def test_bound_to_the_backbone_it_saw(
    tmp_path: Path, backbone: nn.Module, another_backbone: nn.Module, specimen: Any
) -> None:
    folder = tmp_path / "catalogue"
    Catalog(folder).add(specimen().write(tmp_path / "x"))
    assert Catalog(folder).backbone is None and Catalog(folder).card("x").backbone is None
    Catalog(folder, backbone)
    assert Catalog(folder).backbone == Catalog(folder, backbone).backbone is not None
    with pytest.raises(IncompatibleExpert, match="^BASE "):
        Catalog(folder, another_backbone)
    with pytest.raises(IncompatibleExpert, match="^BASE "):
        Catalog(folder).add(tmp_path / "x", expert_id="y", backbone=another_backbone)
    assert Catalog(folder).ids() == ("x",)


def test_an_expert_of_another_catalogue_brings_its_backbone(
    tmp_path: Path, backbone: nn.Module, another_backbone: nn.Module, specimen: Any
) -> None:
    first = Catalog(tmp_path / "first", backbone)
    first.add(specimen().write(tmp_path / "x"), task="law", licence="mit")
    first.attach("x", quality={"gain": {"value": 0.5}})
    theirs = first.folder / "experts" / "x"
    second = Catalog(tmp_path / "second")
    card = second.add(theirs)
    assert (card.task, card.licence, card.quality) == ("law", "mit", {"gain": {"value": 0.5}})
    assert second.backbone == Catalog(tmp_path / "second", backbone).backbone
    with refused("BASE"):
        Catalog(tmp_path / "third", another_backbone).add(theirs)
    assert Catalog(tmp_path / "third", another_backbone).add(theirs, confirm_base=True).base_confirmed


class Named(nn.Module):
    """A backbone with a name."""

    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.layers, self.lm_head = inner.layers, inner.lm_head
        self.config = type("Config", (), {"_name_or_path": name})()


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("somebody/small", True),
        ("", True),
        ("/models/small/", True),
        ("./small", True),
        ("small", True),
        ("other/small", False),
        ("/models/other", False),
        ("somebody/large", False),
    ],
)
def test_the_name_of_the_base_model(
    name: str, accepted: bool, tmp_path: Path, backbone: nn.Module, specimen: Any
) -> None:
    """The adapter says somebody/small."""
    catalog = Catalog(tmp_path / "catalogue", Named(backbone, name))
    source = specimen().write(tmp_path / "x")
    if not accepted:
        with refused("BASE"):
            catalog.add(source)
        assert catalog.add(source, confirm_base=True).base_confirmed
    else:
        assert not catalog.add(source).base_confirmed


def test_publish_round_trip(catalog: Catalog) -> None:
    torch.manual_seed(0)
    factors = {
        "layers.0.q_proj": LoraFactors(torch.randn(2, 8), torch.randn(8, 2), 0.1),
        "layers.1.q_proj": LoraFactors(torch.randn(3, 8), torch.randn(8, 3), 1 / 3),
        "layers.0.v_proj": LoraFactors(torch.randn(2, 8), torch.randn(16, 2), 7.0),
    }
    gates = {path: torch.randn(8) for path in factors}
    signatures = {"layers.0.q_proj": {"mean": torch.zeros(8), "variance": torch.ones(8), "count": torch.tensor(9)}}
    card = catalog.publish(
        "x", factors, peft_config={"target_modules": sorted(factors), "lora_dropout": 0.1}, gates=gates,
        signatures=signatures, task="law", recipe={"steps": 10},
    )  # fmt: skip
    assert card.has_gates and card.has_signatures and card.recipe == {"steps": 10} and card.source.kind == "trained"
    expert = catalog.expert("x")
    for path, factor in factors.items():
        assert torch.equal(expert.factors[path].down, factor.down) and torch.equal(expert.factors[path].up, factor.up)
        assert expert.factors[path].scale == pytest.approx(factor.scale, rel=1e-12)
        assert expert.gates is not None and torch.equal(expert.gates[path], gates[path])
    assert expert.signatures is not None and expert.signatures["layers.0.q_proj"]["count"] == 9
    assert catalog.publish("x", factors, peft_config={"target_modules": sorted(factors), "lora_dropout": 0.1},
                           gates=gates, signatures=signatures) == card  # fmt: skip
    with refused("EXISTS"):
        catalog.publish("x", some_factors(), peft_config={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_publish_keeps_the_dtype(dtype: torch.dtype, catalog: Catalog) -> None:
    factors = {path: LoraFactors(f.down.to(dtype), f.up.to(dtype), f.scale) for path, f in some_factors().items()}
    catalog.publish("x", factors, peft_config={})
    read = catalog.expert("x").factors
    assert all(torch.equal(read[path].down, factor.down.float()) for path, factor in factors.items())
    assert catalog.card("x").dtype == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def test_publish_refuses_what_add_refuses(catalog: Catalog) -> None:
    bad = some_factors()
    bad["layers.0.q_proj"].down[0, 0] = float("nan")
    with refused("VALUE"):
        catalog.publish("x", bad, peft_config={})
    with refused("FEATURE"):
        catalog.publish("x", some_factors(), peft_config={"use_dora": True})
    with refused("INCOMPLETE"):
        catalog.publish("x", some_factors(), peft_config={}, gates={"layers.0.q_proj": torch.zeros(8)})
    with pytest.raises(IncompatibleExpert, match="^SHAPE "):
        wide = {"layers.0.q_proj": LoraFactors(torch.randn(2, 9), torch.randn(8, 2), 1.0)}
        catalog.publish("x", wide, peft_config={})
    assert catalog.ids() == ()


def test_attach(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    catalog.add(specimen().write(tmp_path / "x"))
    catalog.disable("x")
    gates = {path: torch.randn(site.d_in) for path, site in catalog.card("x").sites.items()}
    catalog.attach("x", gates=gates)
    catalog.attach("x", quality={"gain": 1.0}, licence="mit", recipe={"steps": 3})
    expert = catalog.expert("x")
    assert expert.gates is not None and all(torch.equal(expert.gates[path], gate) for path, gate in gates.items())
    assert (expert.card.quality, expert.card.licence, expert.card.recipe) == ({"gain": 1.0}, "mit", {"steps": 3})
    assert catalog.states() == {"x": "disabled"}
    with refused("SHAPE"):
        catalog.attach("x", gates={path: torch.zeros(3) for path in gates})
    with refused("MISSING"):
        catalog.attach("y", quality={})
    assert [finding.code for finding in catalog.check()] == []


def test_check_names_what_is_wrong(tmp_path: Path, backbone: nn.Module, specimen: Any) -> None:
    catalog = Catalog(tmp_path / "catalogue")
    zero = specimen()
    for name in zero.tensors:
        zero.tensors[name] = torch.zeros_like(zero.tensors[name])
    catalog.add(zero.write(tmp_path / "zero"))
    (catalog.folder / "experts" / "zero" / "notes.txt").write_text("x")
    codes = {finding.code for finding in catalog.check()}
    assert codes == {"BASE", "LICENCE", "GATES", "INERT", "FILES"}
    other = specimen(targets=("q_proj", "v_proj"))
    other.config["target_modules"] = ["q_proj", "v_proj"]
    other.rename("layers.1", "layers.9")
    catalog.add(other.write(tmp_path / "other"))
    found = catalog.check("other", backbone=backbone)
    assert {finding.code for finding in found} == {"TENSOR", "INCOMPLETE"}
    assert {finding.level for finding in found} == {"error"}


def test_fit_is_the_check_of_compose(tmp_path: Path, backbone: nn.Module, specimen: Any) -> None:
    catalog = Catalog(tmp_path / "catalogue")
    catalog.add(specimen().write(tmp_path / "x"))
    sites = linear_sites(backbone)
    fit(catalog.expert("x"), sites)
    fewer = {path: site for path, site in sites.items() if "layers.1" not in path}
    with pytest.raises(IncompatibleExpert, match="^TENSOR "):
        fit(catalog.expert("x"), fewer)
    with pytest.raises(IncompatibleExpert, match="^INCOMPLETE .* would do nothing"):
        fit(catalog.expert("x"), {"other": sites["lm_head"]})


def test_diff(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    catalog.add(specimen().write(tmp_path / "a"))
    catalog.add(specimen(rank=2, targets=("q_proj",), seed=9).write(tmp_path / "b"))
    same, other = catalog.diff("a", "a"), catalog.diff("a", "b")
    assert same.cosine == pytest.approx(1) and same.settings == {} and not same.only_a
    assert all(site.norm_difference == pytest.approx(0, abs=1e-4) for site in same.sites.values())
    assert set(other.settings) == {"rank", "targets"} and len(other.only_a) == 4 and not other.only_b
    a, b = catalog.expert("a").factors["layers.0.q_proj"], catalog.expert("b").factors["layers.0.q_proj"]
    update_a, update_b = (f.scale * f.up.double() @ f.down.double() for f in (a, b))
    site = other.sites["layers.0.q_proj"]
    assert site.norm_difference == pytest.approx((update_a - update_b).norm().item(), rel=1e-9)
    assert site.cosine == pytest.approx(torch.cosine_similarity(update_a.flatten(), update_b.flatten(), 0).item())


def test_a_folder_that_is_no_catalogue(tmp_path: Path, specimen: Any) -> None:
    specimen().write(tmp_path / "shelf" / "x")
    with refused("CATALOG"):
        Catalog(tmp_path / "shelf")
    (tmp_path / "file").write_text("x")
    with refused("CATALOG"):
        Catalog(tmp_path / "file")
    assert Catalog(tmp_path / "nowhere").ids() == () and not (tmp_path / "nowhere").exists()


def test_files_can_be_read_and_diffed(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    catalog.add(specimen().write(tmp_path / "x"))
    catalog.disable("x")
    manifest = json.loads((catalog.folder / "catalog.json").read_text())
    assert manifest["states"] == {"x": "disabled"} and manifest["format"] == 1
    card = json.loads((catalog.folder / "experts" / "x" / "card.json").read_text())
    assert card["sites"]["layers.0.q_proj"] == {"d_in": 8, "d_out": 8, "rank": 4, "scale": 2.0}


def test_a_later_format_is_refused_by_name(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    from mixwright.catalog.card import seal, unseal

    catalog.add(specimen().write(tmp_path / "x"))
    for path in (catalog.folder / "catalog.json", catalog.folder / "experts" / "x" / "card.json"):
        good = path.read_bytes()
        path.write_bytes(seal(unseal(good, "here") | {"format": 99}))
        with refused("VERSION"):
            Catalog(catalog.folder).card("x")
        path.write_bytes(good)
