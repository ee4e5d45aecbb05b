"""Mutated headers, configurations, cards and manifests: a refusal or the same meaning, never another exception.

Derandomised, so that a failure is the same everywhere; raise the numbers by hand to look further.
"""

import copy
import json
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixwright.catalog.adapter import build_factors
from mixwright.catalog.bundle import parse_bundle
from mixwright.catalog.card import CONFIG, WEIGHTS, read_card, write_card
from mixwright.catalog.header import read_header
from mixwright.catalog.peft_config import LoraConfig, read_config
from mixwright.catalog.shelf import Shelf
from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError

FAST = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))

scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-9, 9), st.floats(), st.text(max_size=12),
    st.sampled_from(["F32", "BF16", "F64", "LORA", "all-linear", "q_proj", "gaussian", ".*", "a.b", "\ud800", "\x00"]),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0, 0.5, float("nan"), float("inf")]),
)  # fmt: skip
name = st.text(string.ascii_lowercase + "_.", min_size=1, max_size=14)
value = st.recursive(
    scalar,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=6), inner, max_size=4)
    ),
    max_leaves=6,
)


@st.composite
def changes(draw: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object in which a few places anywhere are replaced, removed, renamed or added."""
    mutant = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 4))):
        node: Any = mutant
        while isinstance(node, (dict, list)) and node and draw(st.booleans()):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
            if not isinstance(node[key], (dict, list)):
                break
            node = node[key]
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "add" and isinstance(node, dict):
            node[draw(name)] = draw(value)
        elif keys:
            key = draw(st.sampled_from(keys))
            if action == "remove":
                del node[key]
            else:
                node[key] = draw(value)
    return mutant


def flipped(data: bytes, chance: random.Random) -> bytes:
    """A copy of some bytes with a few changed, removed, doubled or inserted."""
    mutant = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(max(len(mutant), 1))
        action = chance.randrange(5)
        if action == 0 and mutant:
            mutant[at] ^= 1 << chance.randrange(8)
        elif action == 1 and mutant:
            mutant[at] = chance.choice(b'"{}[]:,\\0159-eE.ntu\x00\xff ')
        elif action == 2:
            del mutant[at : at + chance.randint(1, 40)]
        elif action == 3:
            mutant[at:at] = mutant[at : at + chance.randint(1, 40)]
        else:
            mutant[at:at] = chance.randbytes(chance.randrange(6))
    return bytes(mutant)


class Good:
    """The bytes of one good adapter and what they mean."""

    def __init__(self, specimen: Any) -> None:
        adapter = specimen(rank=2)
        adapter.config["rank_pattern"] = {"layers.0.q_proj": 2}
        adapter.config["alpha_pattern"] = {"v_proj": 3}
        self.config, self.header, self.data = adapter.config, *adapter.entries()
        self.files = {CONFIG: json.dumps(adapter.config).encode(), WEIGHTS: adapter.weights()}
        self.meaning = read_config(self.files[CONFIG], "x")


@pytest.fixture(scope="module")
def good(request: pytest.FixtureRequest) -> Good:
    import sys

    conftest = next(m for n, m in sys.modules.items() if n.endswith("catalog.conftest"))
    return Good(conftest.Specimen)


def check_refusal(error: CatalogError) -> None:
    text = str(error)
    assert len(text) <= 400 and text.isprintable() and error.code.isupper()
    text.encode()


@settings(FAST, max_examples=500)
@given(data=st.data())
def test_configurations(data: st.DataObject, good: Good) -> None:
    mutant = data.draw(changes(good.config))
    try:
        text = json.dumps(mutant).encode()
        config = read_config(text, 'adapter "x"')
    except CatalogError as error:
        return check_refusal(error)
    assert isinstance(config, LoraConfig)
    assert all(0 < config.scale_of(path) <= 65536 for path in ("layers.0.q_proj", "x"))
    same = {key: item for key, item in mutant.items() if key in EFFECTIVE}
    if same == {key: item for key, item in good.config.items() if key in EFFECTIVE}:
        assert config == good.meaning  # whatever else was accepted had no effect
    return None


EFFECTIVE = {"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "use_rslora",
             "fan_in_fan_out", "base_model_name_or_path", "task_type"}  # fmt: skip


def test_configurations_as_bytes(good: Good) -> None:
    for seed in range(4000):
        try:
            read_config(flipped(good.files[CONFIG], random.Random(seed)), 'adapter "x"')
        except CatalogError as error:
            check_refusal(error)


@settings(FAST, max_examples=500)
@given(data=st.data())
def test_headers(data: st.DataObject, good: Good) -> None:
    """An accepted header covers the data exactly once, whatever was done to it."""
    text = json.dumps(data.draw(changes(good.header))).encode()
    try:
        header = read_header(text, 8 + len(text) + len(good.data), 'adapter "x"')
    except CatalogError as error:
        return check_refusal(error)
    spans = sorted((entry.start, entry.end) for entry in header.tensors.values() if entry.end > entry.start)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert (spans[-1][1] if spans else 0) == len(good.data)
    return None


def test_whole_files(good: Good) -> None:
    """Bytes anywhere in the weights: refused, or read as safetensors itself would read them."""
    from safetensors.torch import load

    accepted = 0
    for seed in range(3000):
        mutant = flipped(good.files[WEIGHTS][:1200], random.Random(seed)) + good.files[WEIGHTS][1200:]
        try:
            bundle = parse_bundle({CONFIG: good.files[CONFIG], WEIGHTS: mutant}, 'adapter "x"')
            factors = build_factors(bundle, 'adapter "x"')
        except CatalogError as error:
            check_refusal(error)
            continue
        accepted += 1
        theirs = {name.removeprefix("base_model.model."): tensor for name, tensor in load(mutant).items()}
        for path, factor in factors.items():
            side = next(key for key in theirs if key.startswith(f"{path}.lora_A"))
            assert (theirs[side].float() == factor.down).all()
    assert accepted < 300


@settings(FAST, max_examples=150)
@given(data=st.data())
def test_cards_and_manifests(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, good: Good) -> None:
    """Even with a right seal, a card or a manifest of another form is refused."""
    from mixwright.catalog.card import seal, unseal

    folder = _catalogue(tmp_path_factory, good)
    card = (folder / "experts" / "x" / "card.json").read_bytes()
    mutant = data.draw(changes(unseal(card, "here")))
    mutant.pop("seal", None)
    try:
        read = read_card(seal(mutant), 'expert "x"')
        assert read_card(write_card(read), "again") == read
    except CatalogError as error:
        check_refusal(error)
    except (ValueError, UnicodeEncodeError):
        pass  # cannot be sealed: JSON has neither NaN nor lone surrogates
    manifest = data.draw(
        changes({"format": 1, "backbone": {"fingerprint": "a", "name": None}, "states": {"x": "disabled"}})
    )
    shelf = Shelf(folder.with_name("mutant"))
    shelf.folder.mkdir(exist_ok=True)
    try:
        (shelf.folder / "catalog.json").write_bytes(seal(manifest))
    except (ValueError, UnicodeEncodeError):
        return
    try:
        shelf.manifest()
    except CatalogError as error:
        check_refusal(error)


_FOLDERS: list[Path] = []


def _catalogue(factory: pytest.TempPathFactory, good: Good) -> Path:
    if not _FOLDERS:
        root = factory.mktemp("cards")
        (root / "x").mkdir()
        for name_, content in good.files.items():
            (root / "x" / name_).write_bytes(content)
        Catalog(root / "catalogue").add(root / "x")
        _FOLDERS.append(root / "catalogue")
    return _FOLDERS[0]


def test_mutants_bite(good: Good) -> None:
    """The naive twin: json.loads and dictionary access meet mutants with untyped errors, so the mutants are real."""
    crashes = 0
    for seed in range(300):
        try:
            raw = json.loads(flipped(good.files[CONFIG], random.Random(seed)))
            _ = raw["lora_alpha"] / raw["r"], sorted(raw["target_modules"]), raw["rank_pattern"].items()
        except Exception:
            crashes += 1
    assert crashes > 60
