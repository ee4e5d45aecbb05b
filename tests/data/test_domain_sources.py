import gzip
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from mixwright.data.domain_sources import has_split, read_domain
from mixwright.data.encoded import Encoded
from mixwright.errors import MissingExtra

ROWS = [{"text": f"{word} {number}", "label": word} for word in ("sun", "rain") for number in range(3)]


def lines(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (3, 3), shade).save(path)
    return path


def test_a_table_of_texts(tmp_path):
    domain = read_domain("weather", lines(tmp_path / "w.jsonl"))
    assert domain.class_names == ("rain", "sun") and domain.labels == [1, 1, 1, 0, 0, 0]
    assert domain.items[0] == "sun 0"


def test_a_table_of_pictures_reads_them_from_its_folder(tmp_path):
    for shade, name in enumerate("abcd"):
        picture(tmp_path / "pictures" / f"{name}.png", shade)
    table = tmp_path / "t.csv"
    table.write_text("image,label,group\n" + "".join(f"pictures/{n}.png,{n in 'ab'},x\n" for n in "abcd"))
    domain = read_domain("shades", table)
    assert domain.class_names == ("False", "True") and domain.labels == [1, 1, 0, 0]
    assert domain.groups == ("x", "x") and domain.items[1].read() == (tmp_path / "pictures" / "b.png").read_bytes()
    assert len(set(domain.contents)) == 4


def test_a_table_may_hold_several_domains(tmp_path):
    rows = [{**row, "domain": domain} for domain in ("north", "south") for row in ROWS[: 6 if domain == "north" else 4]]
    path = lines(tmp_path / "t.jsonl", rows)
    assert len(read_domain("north", path)) == 6 and len(read_domain("south", path)) == 4
    with pytest.raises(ValueError, match="no row of domain 'west'; its rows are of north, south"):
        read_domain("west", path)


def test_numbers_are_named_by_the_folder(tmp_path):
    lines(tmp_path / "w" / "train.jsonl", [{"text": f"t{n}", "label": n % 2} for n in range(4)])
    assert read_domain("w", tmp_path / "w").class_names == ("0", "1")
    (tmp_path / "w" / "task.json").write_text('{"labels": ["dry", "wet"]}')
    assert read_domain("w", tmp_path / "w").class_names == ("dry", "wet")


def test_a_folder_with_splits_gives_the_one_that_is_asked_for(tmp_path):
    lines(tmp_path / "train.jsonl")
    lines(tmp_path / "dev.jsonl", [{**row, "text": f"held {row['text']}"} for row in ROWS])
    picture(tmp_path / "test" / "a" / "1.png", 1)
    picture(tmp_path / "test" / "b" / "1.png", 2)
    assert read_domain("w", tmp_path).items[0] == "sun 0"
    assert read_domain("w", tmp_path, split="validation").items[0] == "held sun 0"
    assert isinstance(read_domain("w", f"{tmp_path}#test").items[0], Encoded)
    assert has_split(tmp_path, "validation") and has_split([tmp_path, str(tmp_path)], "test")
    assert not has_split(tmp_path / "train.jsonl", "validation") and not has_split(f"{tmp_path}#train", "validation")


def test_several_sources_are_one_domain(tmp_path):
    one = lines(tmp_path / "1.jsonl")
    other = lines(tmp_path / "2.jsonl", [{"text": "fog 1", "label": "fog"}, {"text": "sun 9", "label": "sun"}])
    domain = read_domain("w", [one, other])
    assert domain.class_names == ("rain", "sun", "fog") and domain.labels == [1, 1, 1, 0, 0, 0, 2, 1]


def test_arrays_of_pictures_and_of_numbers(tmp_path):
    images = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["x", "y", "x", "y"]))
    domain = read_domain("a", tmp_path / "a.npz")
    assert domain.items.shape == (4, 3, 5, 6) and domain.labels == [0, 1, 0, 1] and domain.class_names == ("x", "y")
    assert domain.items[2, 1].tolist() == images[2, :, :, 1].tolist()
    np.savez(tmp_path / "b.npz", x=np.ones((2, 7)), y=np.array([0, 1]), class_names=np.array(["no", "yes"]))
    assert read_domain("b", tmp_path / "b.npz").class_names == ("no", "yes")


def idx(path, values):
    head = bytes((0, 0, 8, values.ndim)) + b"".join(length.to_bytes(4) for length in values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


def test_digits_as_they_are_published(tmp_path):
    images = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([2, 0, 2], dtype=np.uint8))
    for source in (tmp_path / "t10k-images-idx3-ubyte.gz", f"{tmp_path}#test"):
        domain = read_domain("digits", source)
        assert domain.items.shape == (3, 1, 4, 4) and domain.items[1, 0].tolist() == images[1].tolist()
        assert domain.labels == [2, 0, 2] and [len(rows) for rows in domain.rows] == [1, 0, 2]
    with pytest.raises(ValueError, match="no train split, only t10k-images-idx3-ubyte.gz; write .*#test"):
        read_domain("digits", tmp_path)


def test_a_hub_data_set_of_pictures(monkeypatch):
    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class Table(list):
        features = {"image": Image(), "label": types.SimpleNamespace(names=["cat", "dog"])}

        def cast_column(self, column, feature):
            assert column == "image" and not feature.decode
            return self

    rows = Table({"image": {"bytes": bytes([n]), "path": None}, "label": n % 2} for n in range(4))
    asked = []
    library = types.SimpleNamespace(load_dataset=lambda *names, split: asked.append((names, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    domain = read_domain("pets", "someone/pets:small")
    assert asked == [(("someone/pets", "small"), "train")]
    assert domain.class_names == ("cat", "dog") and domain.items[3].read() == b"\x03"
    assert len(set(domain.contents)) == 4


def test_a_folder_may_have_a_hash_in_its_name(tmp_path):
    lines(tmp_path / "c#" / "train.jsonl")
    lines(tmp_path / "c#" / "test.jsonl", [*ROWS, {"text": "fog", "label": "sun"}])
    assert len(read_domain("c", tmp_path / "c#")) == 6
    assert len(read_domain("c", f"{tmp_path / 'c#'}#test")) == 7


def test_what_the_hub_does_not_have_is_said_in_a_sentence(monkeypatch):
    def refuse(*names, split):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=refuse))
    with pytest.raises(ValueError, match=r"data/birdz: no such folder here, .* \(Couldn't reach the Hub\)"):
        read_domain("birds", "data/birdz")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"mixwright\[data\]"):
        read_domain("birds", "data/birdz")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, r"t.jsonl:7: label None; expected the name of a class"),
        ({"text": "x", "label": 1}, "labels are numbers in some rows and texts in others"),
        ({"text": "", "label": "sun"}, "t.jsonl:7: text is empty"),
        ({"text": 3, "label": "sun"}, "t.jsonl:7: text is 3; expected a text"),
        ({"text": "x", "label": True}, "t.jsonl:7: label True"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        read_domain("w", lines(tmp_path / "t.jsonl", [*ROWS, row]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no rows"),
        ("picture,label\na.png,x\n", "columns picture, label; expected image or text, and label"),
        ("image,label\nnone.png,x\n", "t.csv:2: there is no file .*none.png; paths count from the table's folder"),
        ("text,label\na,b,c\n", "t.csv:2: a row of other length"),
        ("text,label\na\n", "t.csv:2: a row of other length"),
        ('text,label\n"a,b\n', "t.csv: not a table in UTF-8"),
        ("text,label\na,x\nb,x\n", "1 class with items; a domain needs two or more"),
        ("text,label,group\na,x,1\nb,x,2\n", "class 'x' is of group '1' in one row and of '2' in another"),
    ],
)
def test_a_faulty_table_says_what_is_wrong(tmp_path, content, said):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_domain("t", tmp_path / "t.csv")


def test_a_number_that_no_class_has_is_named(tmp_path):
    lines(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    (tmp_path / "task.json").write_text('{"labels": ["dry", "wet"]}')
    with pytest.raises(ValueError, match="train.jsonl:2: label 2 is not one of the 2 classes"):
        read_domain("w", tmp_path)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "no array called labels or y or targets"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "one label for each image"),
        ({"images": np.array([[1.0], [np.nan]]), "labels": np.array([0, 1])}, "item 1 has NaN"),
        ({"images": np.zeros((2, 4), complex), "labels": np.array([0, 1])}, "images of complex128"),
        ({"images": np.zeros((2, 4)), "labels": np.array([0.5, 1])}, "labels of float64"),
        ({"images": np.zeros((2, 4)), "labels": np.array([-1, 1])}, "label -1; expected 0 to 1"),
        (
            {"images": np.zeros((2, 4)), "labels": np.array([0, 1]), "class_names": np.array(["x"])},
            "label 1; expected 0 to 0",
        ),
        ({"images": np.array([{}, {}]), "labels": np.array([0, 1])}, "not an .npz file of plain arrays"),
    ],
)
def test_faulty_arrays_say_what_is_wrong(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        read_domain("a", tmp_path / "a.npz")


def test_damaged_arrays_are_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not an .npz file"):
        read_domain("a", tmp_path / "a.npz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    idx(path, np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="expected a file train-labels-idx1-ubyte.gz"):
        read_domain("m", path)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([0, 1], np.uint8))
    assert len(read_domain("m", tmp_path)) == 2
    for damaged, said in ((path.read_bytes()[:-9], "damaged .gz"), (gzip.compress(b"\0" * 40), "not an IDX file")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=said):
            read_domain("m", path)
    path.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12 + b"\0" * 9)
    with pytest.raises(ValueError, match="the file is damaged"):
        read_domain("m", path)


@pytest.mark.parametrize("source", ["nothing", "/nothing", "./a/b", "some/a.csv", "a/b/c"])
def test_a_source_that_is_not_there_is_refused_without_asking_the_hub(source):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_domain("x", source)


def test_other_faults_of_sources(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="a.pt: not a file that domains are read from"):
        read_domain("x", tmp_path / "a.pt")
    with pytest.raises(ValueError, match="an empty list of sources"):
        read_domain("x", [])
    with pytest.raises(ValueError, match="no split 'test'"):
        read_domain("x", f"{tmp_path}#test")
    table, arrays = lines(tmp_path / "t.jsonl"), tmp_path / "a.npz"
    np.savez(arrays, x=np.zeros((2, 3)), y=np.array([0, 1]))
    with pytest.raises(ValueError, match="arrays are not joined"):
        read_domain("x", [table, arrays])
    for shade in (1, 2):
        picture(tmp_path / "p" / str(shade) / "1.png", shade)
    with pytest.raises(ValueError, match="one source holds texts and another images"):
        read_domain("x", [table, tmp_path / "p"])
