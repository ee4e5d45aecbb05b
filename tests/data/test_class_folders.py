import os
import zipfile

import pytest
from PIL import Image

from mixwright.data.class_folders import archive_domain, folder_domain
from mixwright.data.encoded import Encoded


def image(path, shade=0, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade).save(path)
    return path


def text(path, words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words, encoding="utf-8")


def birds(root):
    for shade, name in enumerate(("owl/1.png", "owl/2.PNG", "gull/a.jpg", "gull/b.png")):
        image(root / "birds" / name, shade)
    image(root / "fish" / "cod" / "x.png", 9)
    text(root / "README.txt", "of birds")
    (root / ".hidden").mkdir()
    return root


def test_a_folder_of_items_is_a_class_and_what_holds_it_a_group(tmp_path):
    domain = folder_domain("animals", birds(tmp_path))
    assert domain.class_names == ("birds/gull", "birds/owl", "fish/cod")
    assert domain.groups == ("birds", "birds", "fish")
    assert domain.labels == [0, 0, 1, 1, 2]
    assert [item.path.name for item in domain.items] == ["a.jpg", "b.png", "1.png", "2.PNG", "x.png"]


def test_a_folder_around_everything_is_left_out_of_the_names(tmp_path):
    birds(tmp_path / "data" / "set")
    assert folder_domain("animals", tmp_path).class_names == ("birds/gull", "birds/owl", "fish/cod")


def test_texts_are_items_too(tmp_path):
    text(tmp_path / "glad" / "1.txt", "\ufeffwell done")
    text(tmp_path / "sad" / "1.txt", "oh no")
    (tmp_path / "sad" / "1.json").write_text("{}")
    domain = folder_domain("moods", tmp_path)
    assert (domain.items, domain.labels, domain.groups) == (["well done", "oh no"], [0, 1], ())


def test_an_archive_reads_like_its_folder(tmp_path):
    folder = birds(tmp_path / "animals")
    with zipfile.ZipFile(tmp_path / "animals.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
        archive.writestr("__MACOSX/animals/birds/owl/._1.png", b"resource")
    one, other = archive_domain("animals", tmp_path / "animals.zip"), folder_domain("animals", folder)
    assert (one.class_names, one.groups, one.labels) == (other.class_names, other.groups, other.labels)
    assert [item.read() for item in one.items] == [item.read() for item in other.items]


def test_a_link_to_a_folder_is_followed(tmp_path):
    birds(tmp_path / "real")
    image(tmp_path / "set" / "cod" / "1.png")
    (tmp_path / "set" / "owl").symlink_to(tmp_path / "real" / "birds" / "owl")
    assert folder_domain("linked", tmp_path / "set").class_names == ("cod", "owl")


def test_a_link_to_a_file_is_read(tmp_path):
    real = image(tmp_path / "real.png")
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").symlink_to(real)
    assert folder_domain("linked", tmp_path / "set").items[0].read() == real.read_bytes()


def _loop(root):
    (root / "birds" / "back").symlink_to(root)


def _self(root):
    (root / "birds" / "self.png").symlink_to(root / "birds" / "self.png")


def _dangling(root):
    (root / "birds" / "owl" / "3.png").symlink_to(root / "nothing.png")


def _pipe(root):
    os.mkfifo(root / "birds" / "owl" / "3.png")


def _empty(root):
    (root / "birds" / "crow").mkdir()


def _strange(root):
    text(root / "birds" / "crow" / "1.heic", "?")


def _mixed(root):
    text(root / "birds" / "crow" / "1.txt", "a crow")


def _beside(root):
    image(root / "birds" / "stray.png")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_loop, "a link that leads back to"),
        (_self, "self.png: cannot be read"),
        (_dangling, "3.png: cannot be read"),
        (_pipe, "3.png: neither a file nor a folder"),
        (_empty, "class 'birds/crow' is empty"),
        (_strange, r"class 'birds/crow' has no item that can be read \(1.heic\)"),
        (_mixed, "a domain is of one kind"),
        (_beside, r"'birds' holds items .*stray.png\) and the class folder '(gull|owl)'"),
    ],
)
def test_a_faulty_folder_names_what_is_wrong(tmp_path, damage, said):
    damage(birds(tmp_path))
    with pytest.raises(ValueError, match=said):
        folder_domain("animals", tmp_path)


@pytest.mark.parametrize("content", [[], ["a.png"]])
def test_a_folder_without_class_folders_is_refused(tmp_path, content):
    for name in content:
        image(tmp_path / name)
    with pytest.raises(ValueError, match="no class folders; expected a folder for each class"):
        folder_domain("none", tmp_path)


def test_folders_without_end_are_refused(tmp_path):
    deep = tmp_path
    for _ in range(34):
        deep = deep / "d"
    image(deep / "1.png")
    with pytest.raises(ValueError, match="folders deep; at most 32"):
        folder_domain("deep", tmp_path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty text"),
        (b" \n", "an empty text"),
        (b"caf\xe9", "not UTF-8 text"),
        (b"x" * (1 << 20) + b"y", "bytes; a text"),
    ],
)
def test_a_text_that_is_none_is_refused(data, said):
    with pytest.raises(ValueError, match=f"note.txt: {said}" if said[0] != "b" else said):
        Encoded("note.txt", data=data).text()


def test_a_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ValueError, match="a.zip: not a readable zip archive"):
        archive_domain("a", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.txt", "words " * 40)
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF  # a bit of the content: its checksum no longer agrees
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.zip: not a readable zip archive"):
        archive_domain("a", path)


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("mixwright.data.encoded._LARGEST_ARCHIVE", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.txt", "0" * 5000)
    with pytest.raises(ValueError, match="5000 bytes when unpacked; at most 1000"):
        archive_domain("bomb", tmp_path / "bomb.zip")


def test_what_is_no_file_any_more_is_said_when_it_is_read(tmp_path):
    path = image(tmp_path / "a.png")
    item = Encoded(str(path), path)
    path.unlink()
    with pytest.raises(ValueError, match=r"a.png: cannot be read .* repair it or take it out"):
        item.read()
