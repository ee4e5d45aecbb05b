"""The ledger of a model made of several: each component's licence or a refusal, their union, the files beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixwright.composition.ledger import Component, Ledger, open_ledger, read_entries
from mixwright.errors import CatalogError
from mixwright.files import sha256_bytes

RIGHTS = "Copyright (c) 2024 Jane Roe"


def model_folder(place: Path, licence: str, **files: str) -> Component:
    place.mkdir()
    (place / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    for name, text in files.items():
        (place / name).write_text(text)
    return Component(name=place.name, path=str(place), fingerprint="f" * 32, architecture="TinyLM", used=("blocks.0",))


@pytest.fixture
def pair(tmp_path: Path) -> list[Component]:
    return [
        model_folder(tmp_path / "left", "apache-2.0", NOTICE=f"Left\n{RIGHTS}", LICENSE="Be kind."),
        model_folder(tmp_path / "right", "cc-by-nc-4.0"),
    ]


def test_a_ledger_unites_and_says_where_each_claim_was_read(pair: list[Component]) -> None:
    ledger = open_ledger(pair)
    plain = json.loads(json.dumps(ledger.plain()))
    assert plain["licence"] == "Apache-2.0 AND CC-BY-NC-4.0"
    assert plain["obligations"] == ["attribution", "notice", "non-commercial"]
    assert [one["name"] for one in plain["components"]] == ["left", "right"]
    card = (Path(pair[0].path) / "README.md").read_bytes()
    assert plain["components"][0]["claim"] == {"source": "README.md", "sha256": sha256_bytes(card), "link": None}
    assert "not legal advice" in plain["note"]
    assert ledger.metadata() == {
        "license": "other", "license_name": "Apache-2.0 AND CC-BY-NC-4.0", "license_link": "ledger.json",
    }  # fmt: skip


def test_one_licence_for_all_is_the_hubs_word(tmp_path: Path) -> None:
    same = [model_folder(tmp_path / name, "Apache-2.0") for name in ("a", "b")]
    assert open_ledger(same).metadata() == {"license": "apache-2.0"}


def test_what_is_left_after_a_cut_is_counted_again(pair: list[Component]) -> None:
    left = open_ledger(pair).only(["left"])
    assert left.duties == ("attribution", "notice")
    assert left.metadata() == {"license": "apache-2.0"}


def test_every_unknown_licence_is_refused_at_once(tmp_path: Path) -> None:
    built = Component(name="built", path="", fingerprint="0" * 32)
    other = model_folder(tmp_path / "other", "other")
    with pytest.raises(CatalogError, match="^LICENCE licences: component") as refusal:
        open_ledger([built, other])
    assert "nothing says under which licence" in str(refusal.value)
    assert any('component "other"' in note for note in refusal.value.__notes__)
    stated = open_ledger([built, other], {"built": "mit", "other": "LicenseRef-Acme"})
    assert stated.duties == ("attribution", "terms of its own")
    assert [entry.licence.source for entry in stated.entries] == ["stated", "stated"]
    with pytest.raises(ValueError, match="licences.bilt: .* did you mean 'built'"):
        open_ledger([built, other], {"bilt": "mit"})


def test_conflicts_are_told_to_people_and_machines(pair: list[Component]) -> None:
    ledger = open_ledger(pair, {"left": "GPL-3.0-only"})
    assert ledger.plain()["conflicts"][0]["components"] == ["left", "right"]
    assert "does not go together: GPL-3.0-only allows no further restrictions" in ledger.text()
    assert "stated over README.md, which says Apache-2.0" in ledger.text()


def write(ledger: Ledger, folder: Path) -> None:
    for name, data in ledger.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_the_notice_attributes_and_carries_the_notices(pair: list[Component], tmp_path: Path) -> None:
    write(open_ledger(pair), tmp_path / "saved")
    notice = (tmp_path / "saved" / "NOTICE").read_text()
    assert RIGHTS in notice
    assert "licence: CC-BY-NC-4.0" in notice
    assert "asked: no commercial use" in notice
    assert (tmp_path / "saved" / "licences" / "0-LICENSE").read_text() == "Be kind."


def test_a_saved_ledger_is_known_again_without_the_folders(pair: list[Component], tmp_path: Path) -> None:
    ledger = open_ledger(pair)
    write(ledger, tmp_path / "saved")
    for component in pair:
        shutil.rmtree(component.path)
    with pytest.raises(CatalogError, match="LICENCE"):
        open_ledger(pair)
    again = open_ledger(pair, known=read_entries(tmp_path / "saved"))
    assert again.files() == ledger.files()
    assert read_entries(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda saved: (saved / "licences" / "0-LICENSE").write_text("Be unkind."), "HASH"),
        (lambda saved: (saved / "licences" / "0-LICENSE").unlink(), "PATH"),
        (lambda saved: swap(saved, "Apache-2.0", "Freebie-1"), "LICENCE"),
        (lambda saved: swap(saved, '"claim"', '"clam"'), "CONFIG"),
        (lambda saved: swap(saved, '"LICENSE": ', '"../x": '), "PATH"),
        (lambda saved: (saved / "ledger.json").write_text("{"), "JSON"),
        (lambda saved: (saved / "ledger.json").write_text('{"components": [1]}'), "CONFIG"),
    ],
)
def test_a_changed_ledger_is_refused(change: Any, code: str, pair: list[Component], tmp_path: Path) -> None:
    write(open_ledger(pair), tmp_path / "saved")
    change(tmp_path / "saved")
    with pytest.raises(CatalogError) as refusal:
        read_entries(tmp_path / "saved")
    assert refusal.value.code == code


def swap(saved: Path, old: str, new: str) -> None:
    text = (saved / "ledger.json").read_text()
    (saved / "ledger.json").write_text(text.replace(old, new))
