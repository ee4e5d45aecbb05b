"""The synthetic suite measures what it says: tasks side by side are tasks apart, and routing finds the skills."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("benchmarks_importable")


KINDS = ["lora", "poly", "mhr", "tlora", "tensorpoly-1", "released", "tensorpoly-2", "entangled", "private"]


@pytest.mark.parametrize("kind", KINDS)
def test_new_tasks_side_by_side_share_nothing_and_leave_the_experts_alone(kind: str) -> None:
    from benchmarks import skills_members as members
    from benchmarks.skills_world import Examples, Size, make_world

    settings = {
        "lora": {"experts": "lora", "rank": 2},
        "private": {"experts": "poly", "rank": 2},
        "poly": {"experts": "poly", "rank": 2, "num_latent": 3},
        "mhr": {"experts": "mhr", "rank": 2, "num_latent": 3, "heads": 4},
        "released": {"experts": "tensorpoly-1", "rank": 4, "num_latent": 3, "init": "released"},
        "entangled": {"experts": "entangled", "rank": 4, "num_latent": 3, "groups": 2},
    }.get(kind, {"experts": kind, "rank": 4, "num_latent": 3})
    one = members.Member(name=kind, settings=settings, private=kind == "private")
    world = make_world(0, 4, Size(width=16, train_tasks=4, held_out_tasks=3, examples=8, shots=(6,), test_examples=8))
    layer = members.train(members.fresh(one, 16, 4, 0), world.train.train, 20, 1e-2, 0.1)
    shots, ids = world.held_out.train, torch.arange(3)
    other = shots.y.clone()
    other[1] *= -3.0
    for what in one.transfers:
        before = [p.detach().clone() for p in layer.parameters()]
        plain, changed = (
            members.transfer(layer, one, what, Examples(shots.x, y), 6, 1e-2, 3)(shots.x, ids).detach()
            for y in (shots.y, other)
        )
        assert all(torch.equal(a, b.detach()) for a, b in zip(before, layer.parameters()))
        torch.testing.assert_close(plain[[0, 2]], changed[[0, 2]], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(plain[1], changed[1], rtol=1e-3, atol=1e-4)


def test_the_suites_loop_makes_the_librarys_updates_to_the_bit() -> None:
    from benchmarks import skills_members as members
    from benchmarks.skills_world import Size, make_world

    from mixwright.data.batches import Batches
    from mixwright.training.fit import fit
    from mixwright.training.stage import ParamGroup, Stage

    one = members.Member(name="", settings={"experts": "entangled", "rank": 4, "num_latent": 3, "groups": 2})
    data = make_world(0, 4, Size(width=16, train_tasks=4, held_out_tasks=3, examples=8, shots=(6,))).train.train
    ours, theirs = (members.fresh(one, 16, 4, 0) for _ in range(2))
    members.train(ours, data, 20, 1e-2, 0.1)
    groups = (ParamGroup(select=("*.experts.*",), lr=1e-2), ParamGroup(select=("*.router.*",), lr=0.1))
    stage = Stage(name="", groups=groups, steps=20, objective=members.squared, cooldown=0.94, clip=None)
    fit(theirs, stage, Batches([members.as_batch(data)], lambda rows: rows[0], batch_size=1, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_routing_finds_skills_that_one_shared_lora_averages_away(tmp_path: Path) -> None:
    from benchmarks import skills_suite as suite
    from benchmarks.skills_world import Size

    size = Size(
        width=16, num_skills=3, skill_rank=1, parts=(1,), train_tasks=6, held_out_tasks=3, shots=(8,), test_examples=32
    )
    poly = suite.member("Poly", "poly", rank=1, num_latent=3)
    exam = suite.Exam(
        name="tiny", members=(suite.LORA, poly), size=size, column_rank=4, rates=(1e-2, 3e-2), few_shot=(poly,)
    )
    run = suite.Run(seeds=(0,), steps=120, transfer_steps=50)
    shared, routed = (suite.measure(exam, one, run, lambda _: None) for one in exam.members)
    assert routed["held_in"][0] < 0.5 * shared["held_in"][0]
    assert routed["few_shot"]["z/8"]["error"][0] < 0.3
    assert routed["merged_gap"][0] < 1e-5
    assert set(map(float, routed["tuning"])) == {1e-2, 3e-2}
    stuck = suite.all_zero(exam, suite.Run(seeds=(0,), steps=3))
    assert stuck["largest_change_of_a_leaf"] == 0.0 and stuck["held_in"] == [pytest.approx(1.0)]
