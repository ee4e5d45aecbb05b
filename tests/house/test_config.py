"""Recipes are read strictly; every fault names its key, what came and what to do."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixwright.config import decode, encode, override, read_yaml, schema
from mixwright.recipe import BackboneConfig, Recipe, read_recipe
from mixwright.yaml12 import parse_yaml, write_yaml


@dataclass(frozen=True)
class Part:
    """A part."""

    SHORTHAND: ClassVar[str] = "name"
    name: str
    """What it is called,
    in one word."""
    weight: float = 1.0


@dataclass(frozen=True)
class Whole:
    """A whole."""

    parts: tuple[Part, ...] = ()
    by_name: dict[str, Part] = field(default_factory=dict[str, Part])
    best: Part | None = None
    mode: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if len(self.parts) > 2:
            raise ValueError(f"at most 2 parts, got {len(self.parts)}")


def refused(mapping: Any, cls: type = Whole) -> str:
    with pytest.raises(ValueError) as caught:
        decode(cls, mapping, where="f.yaml")
    return str(caught.value)


def test_nested_shapes_and_shorthands_are_read() -> None:
    whole = decode(Whole, {"parts": ["x", {"name": "y", "weight": 2}], "by_name": {"k": "z"}, "best": "w"})
    assert whole == Whole((Part("x"), Part("y", 2.0)), {"k": Part("z")}, Part("w"))


def test_an_unknown_key_names_the_nearest_wherever_it_stands() -> None:
    assert refused({"mod": "a"}) == "f.yaml.mod: unknown key; did you mean 'mode'?"
    assert refused({"parts": [{"nme": "x"}]}) == "f.yaml.parts[0].nme: unknown key; did you mean 'name'?"
    assert refused({"by_name": {"k": {"wight": 1}}}) == "f.yaml.by_name.k.wight: unknown key; did you mean 'weight'?"
    assert refused({"zzz": 1}) == "f.yaml.zzz: unknown key; known here: parts, by_name, best, mode"


def test_every_unknown_key_is_named_at_once() -> None:
    assert len(refused({"mod": "a", "pats": [], "best": {"nam": "x"}}).splitlines()) == 3


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"best": {}}, "f.yaml.best.name: missing"),
        ({"best": {"name": 3}}, "f.yaml.best.name: expected a valid string, got 3"),
        ({"best": {"name": "x", "weight": "2"}}, "f.yaml.best.weight: expected a valid number, got '2'"),
        ({"mode": "c"}, "f.yaml.mode: expected 'a' or 'b', got 'c'"),
        ({"parts": ["x", "y", "z"]}, "f.yaml: at most 2 parts, got 3"),
        ([1], "f.yaml: expected keys and values, got [1]"),
    ],
)
def test_wrong_values_are_told_where_they_stand(mapping: Any, message: str) -> None:
    assert refused(mapping) == message


def test_what_is_not_plain_data_is_refused() -> None:
    assert "only plain data" in refused({"mode": object()})


def test_a_recipe_survives_the_way_to_yaml_and_back() -> None:
    recipe = decode(Recipe, {"backbone": "x", "data": {"train": ["a", "b"]}, "config": {"rate": 5e-3, "words": ["no"]}})
    assert recipe.backbone == BackboneConfig(path="x")
    assert decode(Recipe, parse_yaml(write_yaml(encode(recipe)))) == recipe


def test_the_recipe_names_each_fault(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backbone: x\ntrain: {batchsize: 3}\nmetod: y\n")
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    lines = str(caught.value).splitlines()
    assert lines == [
        f"{path}.metod: unknown key; did you mean 'method'?",
        f"{path}.train.batchsize: unknown key; did you mean 'batch_size'?",
    ]


def test_settings_write_over_the_file(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("backbone: x\ntrain: {precision: no}\n")
    recipe = read_recipe(path, ["train.batch_size=4", "config.learning_rate=5e-3", "data.train=[a, b]", "seed=7"])
    assert (recipe.train.precision, recipe.train.batch_size, recipe.seed) == ("no", 4, 7)
    assert (recipe.config, recipe.data.train) == ({"learning_rate": 0.005}, ("a", "b"))


def test_override_leaves_its_argument_alone_and_checks_the_path() -> None:
    before = {"a": {"b": 1}}
    assert override(before, ["a.b=2", "c.d=x"]) == {"a": {"b": 2}, "c": {"d": "x"}}
    assert before == {"a": {"b": 1}}
    for setting in ("a", "=1", "a..b=1", ".a=1"):
        with pytest.raises(ValueError, match="expected KEY=VALUE"):
            override(before, [setting])
    with pytest.raises(ValueError, match=r"a\.b is the value 1 and has no parts"):
        override(before, ["a.b.c=2"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("on", "on"), ("5e-3", 0.005), ("010", 10), ("1:30", "1:30"), ("2020-01-01", "2020-01-01")]
    + [("true", True), ("~", None), ("", None), ("1_000", "1_000"), ("-1.", -1.0), ("0x10", "0x10"), ("08", 8)],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse_yaml(f"k: {text}") == {"k": value}


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: 1\na: 2", "stands twice"), ("a: &x [1]\nb: *x", "aliases"), ("a: !!python/name:os.system x", "tag")]
    + [("1: 2", "not text"), ("a: [", "line 1"), ("[" * 50_000, "RecursionError"), ("a: \0", "not YAML")],
)
def test_what_yaml_allows_and_a_recipe_does_not(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_yaml(text, "here")


def test_files_that_cannot_be_a_recipe(tmp_path: Any) -> None:
    for name, data, word in [
        ("l", b"- 1", "keys and values"),
        ("u", b"\xff\xfe\x00", "UTF-8"),
        ("b", b"#" * 1_000_001, "at most"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=word):
            read_yaml(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_yaml(tmp_path / "none")


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_what_is_written_is_read_back(mapping: dict[str, Any]) -> None:
    assert parse_yaml(write_yaml(mapping)) == mapping


@given(st.dictionaries(st.sampled_from(["parts", "by_name", "best", "mode", "x"]), plain))
def test_no_plain_data_gets_anything_but_a_value_or_a_refusal(mapping: dict[str, Any]) -> None:
    try:
        assert isinstance(decode(Whole, mapping), Whole)
    except ValueError as error:
        assert str(error)


def test_the_schema_describes_and_closes_every_object() -> None:
    described = schema(Whole)
    part = described["$defs"]["Part"]
    assert part["properties"]["name"]["description"] == "What it is called, in one word."
    assert described["additionalProperties"] is False and part["additionalProperties"] is False
