"""Whatever is done to a file, reading it ends in a domain or in one clear error."""

import gzip
import io
import random
import zipfile

import numpy as np
import pytest
from PIL import Image

from mixwright.data.domain_sources import read_domain
from mixwright.data.encoded import Encoded
from mixwright.data.images import decode

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8))


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        place = draw.randrange(len(changed))
        match draw.randrange(4):
            case 0:
                del changed[max(1, place) :]
            case 1:
                changed[place:place] = draw.randbytes(draw.randint(1, 9))
            case _:
                changed[place] = draw.randrange(256)
    return bytes(changed)


def pictures() -> dict[str, bytes]:
    found = {}
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"):
        buffer = io.BytesIO()
        PICTURE.save(buffer, name)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("name", pictures())
def test_a_damaged_picture_is_a_value_error_that_names_it(name):
    draw, data = random.Random(name), pictures()[name]
    for _ in range(60):
        try:
            decode(Encoded("some.img", data=mutated(data, draw)), draw.choice((None, 8)))
        except ValueError as error:
            assert str(error).startswith("some.img: ")


def idx(values: np.ndarray) -> bytes:
    lengths = b"".join(length.to_bytes(4) for length in values.shape)
    return gzip.compress(bytes((0, 0, 8, values.ndim)) + lengths + values.tobytes())


def files() -> dict[str, bytes]:
    archive, arrays = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as written:
        for name in ("a/1.txt", "a/2.txt", "b/1.txt", "b/2.txt"):
            written.writestr(name, f"the text {name}")
    np.savez(arrays, images=np.arange(36, dtype=np.uint8).reshape(4, 3, 3), labels=np.array([0, 1, 0, 1]))
    return {
        "a.zip": archive.getvalue(),
        "a.npz": arrays.getvalue(),
        "a.csv": b'text,label\na,x\n"b,c",y\n',
        "a.jsonl": b'{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
        "train-images-idx3-ubyte.gz": idx(np.zeros((2, 3, 3), np.uint8)),
    }


@pytest.mark.parametrize("name", files())
def test_a_damaged_source_is_a_value_error(tmp_path, name):
    draw, data, path = random.Random(name), files()[name], tmp_path / name
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.array([0, 1], np.uint8)))
    path.write_bytes(data)
    assert len(read_domain("whole", path).class_names) == 2
    refused = 0
    for _ in range(80):
        path.write_bytes(mutated(data, draw))
        try:
            read_domain("damaged", path)
        except ValueError:
            refused += 1
    assert refused > 10
