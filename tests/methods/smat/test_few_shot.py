"""The few-shot benchmark measures what it says: no class on both sides, the same episodes for all, honest look-ups."""

import importlib
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixwright.data.episodes import Episode
from mixwright.evaluation.episodes import by_prototypes, score

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="a source distribution has no benchmarks")


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)


def module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.few_shot{name}")


def patterns(classes: int, seed: int) -> Any:
    """Twenty noisy images of each of some random patterns."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.rand(classes, 1, 28, 28, generator=draw)
    images = (clean * 0.7 + 0.3 * torch.rand(classes, 20, 28, 28, generator=draw)).flatten(0, 1)
    return module("_glyphs").Pictures((images * 255).byte(), torch.arange(classes).repeat_interleave(20))


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """Two training domains, three tests, a random ViT, a few tasks."""
    few, rows, backbone = module(""), module("_rows"), module("_backbone")
    named = {"latin": patterns(16, 0), "shapes": patterns(16, 1)}
    tests = {"latin": patterns(16, 2), "shapes": patterns(16, 3)}
    out = {"digits": patterns(10, 4), "retention": patterns(16, 5)}
    given = module("_glyphs").World(named, tests, out, patterns(2, 6))
    torch.manual_seed(0)
    backbone.empty_vit(backbone.Pretraining(width=16, layers=2)).save_pretrained(tmp_path / "vit")
    budget = rows.Budget(tasks=4, accumulate=2, experts=2, snapshots=(2,), fisher_tasks=2)
    sizes = few.Sizes(episodes=4, routed_episodes=3, curve_episodes=2, tuned_episodes=1, seeds=1)
    return few.Bench(given, partial(few.opened, tmp_path / "vit"), budget, sizes, tmp_path / "rows")


def test_look_ups_are_what_a_pass_for_every_episode_gives(bench: Any) -> None:
    exams, exam = bench.exams, module("_exam")
    pixels = module("_backbone").pixels
    found = exams.fixed(None)
    for name, rows in exams.episodes.items():
        images = exams.domains[name].images
        episodes = [Episode(pixels(images[e.support]), e.labels, pixels(images[e.query]), e.asked) for e in rows]
        expected = score(by_prototypes(lambda x: exams.embed(x, None)), episodes, len(episodes))
        assert found[name].accuracy == pytest.approx(expected.accuracy.tolist())
        assert found[name].ece == pytest.approx(expected.ece, abs=1e-5)
        assert all(not set(e.support.tolist()) & set(e.query.tolist()) and len(e.query) > 0 for e in rows)
    chosen = exams.chosen(lambda features, labels: bench.base)
    assert {name: s.accuracy for name, s in chosen.items()} == {name: s.accuracy for name, s in found.items()}
    assert exam.exam("latin", exams.domains["latin"], 4)[3].support.equal(exams.episodes["latin"][3].support)


def test_a_mean_over_domains_averages_seeds_within_an_episode() -> None:
    averaged = module("_exam").averaged
    found = averaged([[[0.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    assert found.value == 0.5 and found.half == 0.0
    spread = averaged([[[0.0, 1.0, 0.0, 1.0]]])
    assert spread.half == pytest.approx(1.96 * (1 / 3 / 4) ** 0.5)


def test_rows_differ_in_what_they_may_change_and_are_kept(bench: Any) -> None:
    rows, trainer = module("_rows"), bench.trainer
    base = bench.base
    biases = trainer.trained(rows.row_named("biases only"), 0)
    assert set(biases.names) == {name for name in base if name.endswith(".bias")} and biases.is_fixed
    changed = {name for name, tensor in biases.uniform().items() if not torch.equal(tensor, base[name])}
    assert changed and changed <= set(biases.names)
    sparse = trainer.trained(rows.row_named("post-hoc sparse"), 0)
    acting = torch.cat([sparse.model.deltas.masks(name).flatten() for name in sparse.names])
    assert float((acting > 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    again = trainer.trained(rows.row_named("post-hoc sparse"), 0)
    assert all(torch.equal(a, b) for a, b in zip(sparse.uniform().values(), again.uniform().values(), strict=True))
    pool = trainer.trained(rows.row_named("random masks"), 0)
    assert not pool.is_fixed and set(pool.snapshots) == {2}


def test_every_table_is_made_and_a_cut_run_goes_on(bench: Any, tmp_path: Path) -> None:
    few, cells, rows = module(""), importlib.import_module("benchmarks.cells"), module("_rows")
    found = cells.Cells(tmp_path / "cells.jsonl")
    found.take("direct|pretrained|0", lambda: few.plain(bench.exams.fixed(None)))
    for name in (rows.PMF, rows.SMAT):
        row = rows.row_named(name)
        bench.direct(found, row, 0)
        bench.dials(found, row, 0)
        bench.curve(found, row, 0)
        bench.tuned(found, row, 0)
    bench.ablations(found, rows.row_named(rows.SMAT), 0)
    bench.tuned(found, rows.row_named(rows.PMF), 0, 0.5)
    again = cells.Cells(tmp_path / "cells.jsonl")
    assert again.found == found.found
    text = module("_tables").tables(again.found)
    for said in ("pretrained", "SMAT, uniform mixture", "P>M>F, WiSE 0.5", "by tasks seen", "Fine-tuned", "overlap"):
        assert said in text, said
    assert "nan" not in text
    assert set(few.compact(again.found)) == set(found.found)


def test_variants_of_what_is_chosen_are_measured_as_they_choose(bench: Any, tmp_path: Path) -> None:
    cells, rows = importlib.import_module("benchmarks.cells"), module("_rows")
    found = cells.Cells(tmp_path / "cells.jsonl")
    for row in rows.ROUTED:
        bench.both_ways(found, row, 0)
    assert [key.split("|")[:2] for key in found.found] == [
        [kind, f"{row.name}{more}"]
        for row in rows.ROUTED
        for kind, more in (("trained", ""), ("direct", ""), ("direct", ", uniform mixture"))
    ]
    both = bench.trainer.trained(rows.row_named("SMAT, both"), 0)
    assert both.model.deltas.blocks == ("outside", "layers.0", "layers.1")
    chosen = both.routing(torch.randn(6, 16), torch.arange(3).repeat(2))
    assert chosen.weights.shape == (3, 2)
    assert len(found.found["direct|SMAT, both|0"]["digits"]["accuracy"]) == bench.sizes.routed_episodes


def test_fine_tuning_chooses_its_rate_on_the_support_alone(bench: Any) -> None:
    tuning = module("_tuning")
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    assert tuning.held_out(labels).tolist() == [False, True, False, False, False, True]
    images = torch.randn(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before: dict[str, Tensor] = dict(bench.base)
    after = tuning.trained(bench.embed, before, images, labels, 1e-2)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert tuning.trained(bench.embed, before, images, labels, 0.0) is before


def test_faults_of_a_support_are_what_they_are_called() -> None:
    robust, exam = module("_robust"), module("_exam")
    ways, shots = robust.WAYS, robust.SHOTS
    labels = torch.arange(ways).repeat_interleave(shots)
    asked = torch.arange(ways).repeat_interleave(robust.QUERIES)
    clean = exam.Rows(torch.arange(len(labels)), labels, 1000 + torch.arange(len(asked)), asked)
    draw = torch.Generator().manual_seed(0)
    wrong = robust.faulty(clean, "40% wrong", draw)
    assert int((wrong.rows.labels != labels).sum()) == round(0.4 * len(labels)) and bool(wrong.known.all())
    missing = robust.faulty(clean, "missing classes", draw)
    assert int(missing.rows.labels.max()) == ways - robust.MISSING - 1
    assert int((~missing.known).sum()) == robust.MISSING * robust.QUERIES
    copies = robust.faulty(clean, "duplicates", draw).rows
    assert all(len(copies.support[labels == label].unique()) == 2 for label in range(ways))


def test_a_letter_is_drawn_by_fonts_that_have_it_and_its_class_is_on_one_side() -> None:
    glyphs = module("_glyphs")
    if not list(glyphs.FONTS.rglob("DejaVuSans.ttf")):
        pytest.skip("fonts-dejavu-core is not installed")
    found = glyphs.letters({"Grek"}, next(glyphs.FONTS.rglob("DejaVuSans.ttf")).parent)["Grek"]
    assert "λ" in found and "Λ" not in found and "ά" not in found  # small letters, without accents
    import numpy as np

    rng = np.random.default_rng(0)
    classes = glyphs.Pen().classes(found, 20, rng)
    assert len(classes) == 20 and all(faces.shape[1:] == (40, 40) and faces.max() > 100 for faces in classes)
    drawn = glyphs.pictures(classes, glyphs.plain, torch.Generator().manual_seed(0))
    train, test = glyphs.split(drawn, rng)
    assert train.num_classes == 14 and test.num_classes == 6
    sides = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    assert not sides[0] & sides[1] and len(train.images) + len(test.images) == len(drawn.images)


def test_scripts_that_somebody_names_are_domains_and_what_is_wrong_with_one_is_one_error(tmp_path: Path) -> None:
    glyphs = module("_glyphs")
    inside, outside = glyphs.Drawing(("Armn  Geor, striped",)).domains()
    assert inside == {"trained: Armn Geor, striped": ["Armn", "Geor"]}
    assert not {"Armn", "Geor"} & {code for codes in outside.values() for code in codes} and len(outside) == 3
    inside, outside = glyphs.Drawing(held_out=("Latn", "Thai")).domains()
    assert list(outside) == ["held out: Latn", "held out: Thai"] and "Grek" in inside["latin"]
    assert not {"Latn", "Thai"} & {code for codes in inside.values() for code in codes}
    for given, said in (
        ({"trained": ("Tang",)}, "script Tang is in the pretraining corpus too"),
        ({"trained": ("Latn",), "held_out": ("Latn",)}, "script Latn is in trained: Latn too"),
        ({"trained": ("Latn, sparkling",)}, "'Latn, sparkling': expected script codes"),
        ({"held_out": (" ",)}, "expected script codes"),
    ):
        with pytest.raises(SystemExit, match=said):
            glyphs.Drawing(**given).domains()
    for code, said in (("Xyzw", "there is no such ISO 15924 code"), ("Ahom", "no font has a letter of it")):
        with pytest.raises(SystemExit, match=f"script '{code}': {said}"):
            glyphs.render(tmp_path, glyphs.Drawing(held_out=(code,), fonts=tmp_path))


def test_other_seeds_and_scripts_lie_apart_and_count_on_their_side(tmp_path: Path) -> None:
    few, glyphs, tables = module(""), module("_glyphs"), module("_tables")
    usual, other = glyphs.Drawing(), glyphs.Drawing(held_out=("Thai",))
    assert few.home_of(tmp_path, usual, 0) == tmp_path
    homes = {few.home_of(tmp_path, drawing, seed) for drawing in (usual, other) for seed in (0, 7)}
    assert len(homes) == 4 and all(home == tmp_path or home.parent == tmp_path for home in homes)
    scores = [
        {name: {"accuracy": [value], "ece": 0.0} for name, value in (("trained: Latn", 0.5), ("held out: Thai", 0.25))}
    ]
    assert tables.mean(scores, tables.IN_DOMAINS).value == 50 and tables.mean(scores, tables.OUT_DOMAINS).value == 25
    assert tables.seed_of({"curve|SMAT|2|7": {}, "tuned|SMAT|0": {}}, "curve") == "7"


def test_the_first_seed_is_that_of_every_cell(bench: Any) -> None:
    few, cells = module(""), importlib.import_module("benchmarks.cells")
    bench.sizes = replace(bench.sizes, first_seed=3)
    asked: list[tuple[str, int]] = []
    for name in ("direct", "dials", "alike", "ablations", "curve", "tuned"):
        setattr(bench, name, lambda _, row, seed, *rest, name=name: asked.append((name, seed)))
    few.run(bench, cells.Cells(None))
    assert {seed for _, seed in asked} == {3} and {name for name, _ in asked} == {
        "direct", "dials", "alike", "ablations", "curve", "tuned"
    }  # fmt: skip


def test_the_file_of_a_trained_pool_is_measured_with_its_router_and_without(bench: Any, tmp_path: Path) -> None:
    sizes, rows = importlib.import_module("benchmarks.pool_size"), module("_rows")
    with pytest.raises(SystemExit, match="holds no trained pool"):
        sizes.measure_trained(tmp_path / "rows")
    trained = bench.trainer.trained(rows.row_named("random masks"), 0)
    bench.trainer.trained(rows.row_named(rows.PMF), 0)  # no pool of masks: left out
    (case,) = sizes.measure_trained(tmp_path / "rows")
    assert case["row"] == "random-masks-0" and case["experts"] == 2
    assert 1 - case["density"] == pytest.approx(float(trained.model.sparsity().mean()), abs=1e-6)
    trained.model.save_pretrained(tmp_path / "pool")
    saved = (tmp_path / "pool" / "added.safetensors").stat().st_size
    assert 0 < saved - case["bytes"]["exact"] < 9000  # digests of the backbone, multipliers, longer names
    router = sum(tensor.numel() * tensor.element_size() for tensor in trained.model.router.state_dict().values())
    assert case["bytes"]["exact"] - case["bytes_of_experts"]["exact"] == pytest.approx(router, abs=3000)
    assert case["share"]["compact"] < case["share"]["exact"] and "random-masks-0" in sizes.trained_report([case])
