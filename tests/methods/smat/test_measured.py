"""Where a pool is worse than the pretrained model: measured after training, kept, and said on card and page."""

from pathlib import Path

import numpy as np

import mixwright as mw
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.episodic import EpisodicModel
from mixwright.composition.measured_domains import MeasuredDomain, lost_sentences, measured_in, measured_tensors
from mixwright.data.episode_batches import held_out_batches
from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.synthetic_episodes import image_domains
from mixwright.evaluation.episodes import pretrained, score
from mixwright.evaluation.pool import pool_of
from mixwright.methods.smat.adapting import measure
from mixwright.report.pool_page import pool_page

from .pools import fresh_pool, moved


def test_training_keeps_what_held_out_domains_said_and_the_card_tells_it(tmp_path: Path) -> None:
    tiny_backbone("vit").save_pretrained(tmp_path / "vit")
    for name, domain in image_domains(("strokes", "dots", "cells"), size=16, classes=8, items=5).items():
        np.savez(
            tmp_path / f"{name}.npz", images=domain.items.permute(0, 2, 3, 1).numpy(), labels=np.array(domain.labels)
        )
    recipe = {
        "method": "smat",
        "backbone": str(tmp_path / "vit"),
        "output_dir": str(tmp_path / "run"),
        "data": {
            "domains": {"strokes": str(tmp_path / "strokes.npz")},
            "held_out_domains": {name: str(tmp_path / f"{name}.npz") for name in ("dots", "cells")},
        },
        "config": {
            "experts": 2,
            "steps": 3,
            "learning_rate": 3.0,
            "episodes": {"ways": [2, 4], "queries": 2, "support": 12, "held_out_episodes": 3, "augment": "shapes"},
        },
    }
    report = mw.train(recipe, quiet=True)
    loaded = mw.load(report.composition, backbone=tmp_path / "vit")
    found = measured_in(loaded.whole)
    assert {one.name for one in found} == {"dots", "cells"} and all(one.episodes == 3 for one in found)
    assert any(one.difference != 0 for one in found) and found[0].difference <= found[1].difference
    card = (Path(report.composition) / "README.md").read_text()
    for one in found:
        assert f"| {one.name} | {one.pretrained:.1%} | {one.adapted:.1%} |" in card
    assert lost_sentences(found)[0] in card


def test_what_is_measured_is_what_scores_say() -> None:
    model = moved(fresh_pool())
    assert isinstance(model, EpisodicModel)
    domains = image_domains(("strokes", "dots"), size=16, classes=6, items=5)
    read = {
        name: FixedEpisodes(domains=(domain,), ways=3, shots=2, queries=2, seed=4) for name, domain in domains.items()
    }
    found = measure(model, held_out_batches(read, 2))
    assert [one.name for one in found] == ["strokes", "dots"]
    for one in found:
        assert one.pretrained == score(pretrained(model), read[one.name], 2).mean
    fresh = measure(fresh_pool(), held_out_batches(read, 1))
    assert all(one.difference == 0 and one.half_width == 0 for one in fresh)


def test_losses_are_named_the_worst_first() -> None:
    domains = [
        MeasuredDomain("near", 0.5, 0.75, 0.02, 9),
        MeasuredDomain("lost", 0.5, 0.375, 0.05, 9),
        MeasuredDomain("<b>worst</b>", 0.75, 0.25, 0.05, 9),
    ]
    model = fresh_pool()
    model.whole.update(measured_tensors(domains))
    assert [one.name for one in measured_in(model.whole)] == ["<b>worst</b>", "lost", "near"]
    (said,) = lost_sentences(measured_in(model.whole))
    assert said.startswith("On 2 of 3 held-out domains it was worse") and "lost (-12.5 \u00b1 5.0 points)" in said
    page = pool_page(pool_of(model))
    assert "&lt;b&gt;worst" in page and "<b>worst" not in page
    assert any("| &lt;b>worst&lt;/b> | 75.0% | 25.0% | -50.0 \u00b1 5.0 | 9 |" in line for line in model.card_lines())
    assert lost_sentences([domains[0]]) == ["On none of 1 held-out domain was it worse than the pretrained model."]


def test_a_pool_without_held_out_domains_says_so() -> None:
    assert any(line.startswith("Not measured: no domain was held out") for line in fresh_pool().card_lines())
    assert lost_sentences(()) == []
