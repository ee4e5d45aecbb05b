import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixwright.data.tasks import read_task, task_of


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_each_format_is_known_by_its_keys(tmp_path: Path) -> None:
    prompt = read_task(write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b", "id": 7}))
    text = read_task(write(tmp_path / "t.jsonl", {"text": "a"}, "", {"text": "b"}))
    label = read_task(write(tmp_path / "l.jsonl", {"text": "a", "label": "no"}, {"text": "b", "label": "yes"}))
    assert (prompt.format, prompt.examples[0].target, prompt.name) == ("prompt", "b", "p")
    assert (text.format, len(text), text.examples[1].where) == ("text", 2, f"{tmp_path / 't.jsonl'}:3")
    assert (label.format, label.labels, [e.label for e in label.examples]) == ("label", ("no", "yes"), [0, 1])


def test_a_folder_names_its_labels_and_splits(tmp_path: Path) -> None:
    write(tmp_path / "task.json", {"name": "mood", "labels": ["sad", "glad"]})
    write(tmp_path / "train.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": "sad"})
    write(tmp_path / "dev.jsonl", {"text": "c", "label": 0})
    assert [e.label for e in read_task(tmp_path).examples] == [1, 0]
    assert read_task(str(tmp_path), split="validation").labels == ("sad", "glad")
    with pytest.raises(ValueError, match=r"no test.jsonl; the folder holds dev.jsonl, train.jsonl"):
        read_task(tmp_path, split="test")


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", *({"text": f"{n}{i}"} for i in range(3))) for n in "ab"]
    assert [e.text for e in read_task(files, limit=4).examples] == ["a0", "a1", "a2", "b0"]


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\ntwo\n")
    task = read_task(path)
    assert task.format == "text" and [e.text for e in task.examples] == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}', "{"], "x.jsonl:2: not a line of JSON"),
        (["[1]"], "x.jsonl:1: expected an object with keys, got list"),
        (['{"words": "a"}'], "x.jsonl:1: keys words; expected prompt and completion, text and label, or text"),
        (['{"text": 3}'], "x.jsonl:1: text is int, expected a text"),
        (['{"text": " "}'], "x.jsonl:1: text is empty"),
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'], "x.jsonl:2: no 'completion'"),
        (['{"prompt": "a", "completion": ""}'], "x.jsonl:1: completion is empty"),
        (['{"text": "a", "label": 0}'], "x.jsonl:1: labels are numbers, and nothing names them"),
        (["", " "], "x.jsonl: no examples"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(rows: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_task(write(tmp_path / "x.jsonl", *rows))
    assert message in str(error.value)


@pytest.mark.parametrize("label", ["blue", 2, -1, True, None, 1.0])
def test_a_label_outside_the_set_is_refused(label: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"text": "a", "label": "red"}, {"text": "b", "label": label})
    with pytest.raises(
        ValueError, match=r"x.jsonl:2: label .* is outside the set; expected 0 to 1, or one of 'red', 'green'"
    ):
        read_task(path, labels=["red", "green"])


def test_what_is_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        read_task(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="an empty list of files"):
        read_task([])


def test_a_hub_data_set_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or table)
    task = read_task("someone/mood#train[:2]")
    assert asked == [("someone/mood", "train[:2]")]
    assert task.labels == ("bad", "good") and [e.label for e in task.examples] == [1, 0] and task.name == "mood"


def test_of_a_configuration_of_a_hub_data_set_blank_rows_of_plain_text_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["", " = Title = \n", " \n", "A sentence ."]})
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or table)
    task = read_task("someone/wiki:raw-v1#test")
    assert asked == [("someone/wiki", "raw-v1", "test")]
    assert [(e.text, e.where[-1]) for e in task.examples] == [(" = Title = \n", "1"), ("A sentence .", "3")]


def test_a_folder_of_plain_text_has_splits_too(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} text\n")
    read = [read_task(tmp_path, split=split) for split in ("train", "validation")]
    assert [task.examples[0].text for task in read] == ["the train text\n", "the valid text\n"]
    with pytest.raises(ValueError, match=r"no test.jsonl; the folder holds train.txt, valid.txt"):
        read_task(tmp_path, split="test")
    write(tmp_path / "train.jsonl", {"text": "rows come first"})
    assert read_task(tmp_path).examples[0].text == "rows come first"


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_the_file(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        task = read_task(write(Path(folder) / "x.jsonl", *({"text": text} for text in texts)))
    assert [example.text for example in task.examples] == texts


def test_rows_in_memory_make_the_same_task_as_their_file(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}]
    held = task_of(rows, name="mood")
    assert (held.name, held.labels, held.examples[1].where) == ("mood", ("no", "yes"), "mood[1]")
    assert [e.label for e in held.examples] == [e.label for e in read_task(write(tmp_path / "m.jsonl", *rows)).examples]
    assert task_of([{"text": "a", "label": 1}], name="mood", labels=("sad", "glad")).examples[0].label == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "mood: no examples"),
        ([{"text": "a"}, ("b", "c")], r"mood\[1\]: a tuple; expected rows with keys"),
        ([{"text": "a", "label": "no"}, {"text": "b"}], r"mood\[1\]: no 'label'"),
    ],
)
def test_a_bad_row_in_memory_is_named_by_its_number(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(rows, name="mood")
