"""The page of a model routed by task: everything on it, nothing that runs, and small whatever the model's size."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mixwright.report.heat import Panel, heat
from mixwright.report.markup import visible
from mixwright.report.routing_tiles import rows_of
from mixwright.report.task_page import short, task_page
from mixwright.report.task_terminal import branches, print_task_routing

from .hand_tasks import COMMAND, TASKS, TIMES, task_routing
from .reading import Page
from .test_page import HOSTILE, runs_nothing


def read(source: str) -> Page:
    page = Page(source)
    page.close()
    return page


def test_is_deterministic_and_holds_what_it_promises() -> None:
    source = task_page(task_routing(), TIMES, COMMAND)
    assert source == task_page(task_routing(), TIMES, COMMAND)
    runs_nothing(source)
    page = read(source)
    for words in (
        *TASKS,
        "Routing, layer by layer",
        "Discreteness",
        "No alarm.",
        "11,132,928",
        "3,456",
        "35,389,440",
        "40.2",
        "12.5",
        COMMAND,
        "8 rows of 64 random tokens",
        "Where it comes from",
        "f1n9e4",
    ):
        assert words in page.words, words
    assert source.count('<svg class="heat"') == 4 * 2 and source.count('class="branch"') == 1
    assert "were not measured" not in page.words and "were not measured" in read(task_page(task_routing())).words


def test_the_nearest_tasks_and_the_odd_one_are_named() -> None:
    page = read(task_page(task_routing()))
    assert "mood and topic again are routed most alike: 1" in page.words
    assert "topic stands furthest from the other 2" in page.words


def test_every_square_has_its_weight_as_its_area() -> None:
    drawn = heat(Panel("weight", [[1.0, 0.25, 0.0], [-0.09, 0.5, float("nan")]], even=0.3))
    squares = dict(re.findall(r'<path d="([^"]*)" class="([^"]*)"', drawn))
    assert squares == {"M0 0h0": "o z10", "M1 0h0": "u z5", "M0 1h0": "m z3", "M1 1h0": "o z7"}


def test_rows_say_their_numbers_when_pointed_at() -> None:
    source = task_page(task_routing())
    weights = task_routing().routers[0].weights[1][0]
    assert f"mood, weight: {' '.join(f'{value:.2f}' for value in weights)}" in source


def test_orders_and_shared_routers_have_their_panels() -> None:
    ordered = task_page(task_routing(orders=2))
    assert ordered.count('<svg class="heat"') == 4 * 4 and "weight order 2" in ordered and "adds, order 2" in ordered
    shared = task_page(task_routing(shared=True))
    assert shared.count('<svg class="heat"') == 1 + 4 and "one router for 4 layers" in shared


def test_one_task_and_one_expert_are_shown_too() -> None:
    page = read(task_page(task_routing(["only"], experts=1)))
    assert "One task uses all of it." in page.words and "Tasks by their routing" not in page.words


def test_alarms_are_said_in_words() -> None:
    found = task_routing()
    for layer in found.layers:
        for task in layer.share:
            task[0][2] = 0.0
    assert "Latent experts that add nothing for any task in every layer: latent-2." in read(task_page(found)).words


@pytest.mark.parametrize(("tasks", "layers", "megabytes"), [(24, 6, 0.12), (24, 24, 0.4), (313, 432, 1.5)])
def test_the_page_stays_small(tasks: int, layers: int, megabytes: float) -> None:
    names = [f"dataset_{number // 8}/template {number % 8}" for number in range(tasks)]
    found = task_routing(names, experts=8, layers=layers)
    source = task_page(found)
    assert len(source) < megabytes * 1e6
    page = read(source)
    assert all(name in page.words for name in names)
    if tasks > 24:
        assert f"All {tasks} tasks" in page.words and f"All {layers} layers" in page.words
        assert "groups of the most similar" in page.words
        assert source.count(">g1</b>") == 1 + len(rows_of(found).members[0])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    found = task_routing([name, "other", f"{name}2"])
    source = task_page(found)
    runs_nothing(source)
    source.encode("utf-8")
    assert visible(name) in read(source).words
    assert not set("\u202e\u202c\u2066\x00\x07\x1b") & set(source)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=2, max_size=30, unique=True))
def test_any_names_stay_text(names: list[str]) -> None:
    runs_nothing(task_page(task_routing(names, layers=2)))


def test_counts_of_a_few_characters() -> None:
    assert [short(n) for n in (0, 3_456, 220_000, 11_132_928, 3e9)] == ["0", "3,456", "220 k", "11.1 M", "3 G"]


def printed(**more: object) -> str:
    out = io.StringIO()
    print_task_routing(
        task_routing(**more), Console(file=out, width=100, force_terminal=True, color_system=None), TIMES
    )  # type: ignore[arg-type]
    return out.getvalue()


def test_the_terminal_shows_tree_numbers_and_cost() -> None:
    text = printed()
    assert "3 tasks, 4 latent experts in each of 4 layers" in text
    assert re.search(r"^topic again +─+[┐┘┬]", text, re.MULTILINE)
    assert "model.layers.1.mlp.up_proj" in text and "40.2" in text
    many = printed(tasks=[f"task {number}" for number in range(100)], layers=32)
    assert "and 8 more layers" in many and len(many.splitlines()) < 100


def test_a_name_cannot_drive_the_terminal() -> None:
    text = printed(tasks=["[red]x", "y\x1b[2J", "\u202e"])
    assert "\x1b[2J" not in text and "\u202e" not in text and "[red]x" in text


def test_branches_of_a_tree_drawn_by_hand() -> None:
    from mixwright.evaluation.linkage import Merge

    merges = [Merge(0, 1, 1.0, 2), Merge(2, 3, 2.0, 2), Merge(4, 5, 4.0, 4)]
    assert branches(merges, 4) == [
        "─" * 9 + "┬" + "─" * 26 + "┐",
        "─" * 9 + "┘" + " " * 26 + "│",
        "─" * 18 + "┬" + "─" * 17 + "┘",
        "─" * 18 + "┘",
    ]
