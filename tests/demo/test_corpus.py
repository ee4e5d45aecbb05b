"""The corpus finder: it takes what is there, splits it cleanly, and never fails for what is not."""

import random
from pathlib import Path

from mixwright.demo import corpus
from mixwright.demo.corpus import ENOUGH, Source, digest, find, find_all

YAML = Source(name="yaml", what="YAML tables", patterns=("**/*.yaml",))


def _text(seed: int, characters: int) -> str:
    draw = random.Random(seed)
    lines: list[str] = []
    while sum(map(len, lines)) < characters:
        lines.append(" ".join(f"w{draw.randrange(5000)}" for _ in range(12)) + "\n" + "\n" * (draw.random() < 0.3))
    return "".join(lines)


def _site(root: Path, files: int, characters: int) -> Path:
    for number in range(files):
        path = root / f"package{number}" / "table.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(_text(number, characters), encoding="utf-8")
    return root


def test_a_domain_is_split_and_its_halves_share_no_long_line(tmp_path: Path) -> None:
    domain = find(YAML, [_site(tmp_path, 8, 40_000)])
    assert domain.characters > ENOUGH and len(domain.held_out) >= 4
    known = {line for piece in domain.train for line in piece.splitlines() if len(line) > 60}
    assert not [line for piece in domain.held_out for line in piece.splitlines() if line in known]


def test_text_that_stands_in_every_package_is_taken_once(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / f"p{number}" / "table.yaml"
        path.parent.mkdir()
        path.write_text(_text(0, 30_000), encoding="utf-8")
    assert find(YAML, [tmp_path]).characters < 40_000


def test_a_domain_with_too_little_text_is_left_out_by_name(tmp_path: Path) -> None:
    found, short = find_all(roots=[_site(tmp_path, 8, 40_000)])
    assert [domain.name for domain in found] == ["yaml"]
    assert {"cpp", "licence", "readme", "json", "cmake"} <= {domain.name for domain in short}


def test_unreadable_and_binary_files_are_passed_over(tmp_path: Path) -> None:
    _site(tmp_path, 2, 5_000)
    (tmp_path / "broken.yaml").write_bytes(b"\xff\xfe\x00binary" * 100)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    assert "binary" not in "".join(find(YAML, [tmp_path]).train)


def test_nothing_there_is_an_empty_domain(tmp_path: Path) -> None:
    assert find(YAML, [tmp_path / "absent"]).characters == 0
    assert find_all(roots=[])[0] == ()


def test_the_same_text_gives_the_same_digest(tmp_path: Path) -> None:
    root = _site(tmp_path, 8, 40_000)
    assert digest([find(YAML, [root])]) == digest([find(YAML, [root])])
    (root / "package0" / "table.yaml").write_text(_text(99, 40_000), encoding="utf-8")
    assert digest([find(YAML, [root])]) != digest([])


def test_this_machine_has_a_base_text() -> None:
    assert corpus.find(corpus.BASE).characters > ENOUGH
