import io
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mixwright.data.encoded import Encoded
from mixwright.data.images import ImageReader, decode, pixels_for
from mixwright.data.pixels import PHOTOS, Pixels
from mixwright.errors import MissingExtra


def encoded(image, format="PNG", name="a.png", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **settings)
    return Encoded(name, data=buffer.getvalue())


def ramp(mode="RGB", size=(6, 4)):
    values = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[1], size[0]) * 9
    return Image.fromarray(values).convert(mode)


def test_a_picture_is_decoded_to_its_bytes():
    colours = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert torch.equal(decode(encoded(Image.fromarray(colours))), torch.from_numpy(colours).permute(2, 0, 1))
    assert decode(encoded(ramp("L"))).shape == (1, 4, 6)


def test_black_and_white_and_palettes_and_sixteen_bits_are_read():
    assert decode(encoded(Image.fromarray(np.eye(4, dtype=bool)))).unique().tolist() == [0, 255]
    assert decode(encoded(ramp("RGB").quantize(8))).shape == (3, 4, 6)
    deep = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert decode(encoded(deep)).tolist() == [[[0, 1, 255]]]
    assert decode(encoded(ramp("CMYK"), "JPEG")).shape == (3, 4, 6)


def test_what_shines_through_is_white():
    glyph = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    glyph.putpixel((0, 0), (10, 20, 30, 255))
    assert decode(encoded(glyph))[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_the_camera_says_which_way_is_up():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(ramp(), "JPEG", exif=exif)).shape == (3, 6, 4)


def test_a_large_picture_is_kept_small():
    assert decode(encoded(ramp(size=(60, 40))), 10).shape == (3, 10, 15)
    assert decode(encoded(ramp(size=(60, 40)), "JPEG"), 10).shape == (3, 10, 15)
    assert decode(encoded(ramp(size=(6, 4))), 10).shape == (3, 4, 6)  # a small one is not blown up


def _header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not an image that can be read"),
        (b"a text where an image should be", "not an image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (encoded(NOISE).data[:4000], "a damaged image"),
        (encoded(NOISE, "JPEG").data[:1500], "a damaged image"),
        (encoded(NOISE, "GIF").data[:900], "a damaged image"),
        (_header(60_000, 60_000), "more pixels than the 67108864"),
        (_header(9_000, 9_000), "more pixels than the 67108864"),
        (_header(50, 50), "a damaged image"),
        (encoded(Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "TIFF").data, "pixels are fractions"),
    ],
)
def test_a_faulty_picture_is_named(data, said):
    with pytest.raises(ValueError, match=f"a.png: {said}|{said}") as caught:
        decode(Encoded("a.png", data=data))
    assert "a.png" in str(caught.value)


def test_a_picture_is_decoded_once(monkeypatch):
    item, reader = encoded(ramp()), ImageReader(Pixels(size=4))
    first = reader([item])
    monkeypatch.setattr("mixwright.data.images.decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(reader([item, item])[1:], first)


def test_the_cache_keeps_to_its_room():
    reads = []

    class Counted(Encoded):
        def read(self):
            reads.append(self.where)
            return super().read()

    items = [Counted(str(number), data=encoded(ramp("L", (4, 4))).data) for number in range(3)]
    reader = ImageReader(Pixels(size=4), cache_bytes=32)  # two pictures of sixteen bytes
    for wanted in ([0, 1], [0, 1], [2], [1], [0]):
        reader([items[number] for number in wanted])
    assert reads == ["0", "1", "2", "0"]


def test_augmented_pictures_follow_from_the_generator():
    reader = ImageReader(Pixels(size=4, augmentation=PHOTOS))
    items = [encoded(ramp(size=(20, 20)))]
    one, same = (reader(items, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, same) and not torch.equal(one, reader(items))


VIT = {"do_resize": True, "size": {"height": 224, "width": 224}, "do_normalize": True, "image_mean": [0.5] * 3}
CLIP = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
DINO = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
CONVNEXT = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_std": [0.1, 0.2, 0.4]}


@pytest.mark.parametrize(
    ("settings", "size", "sides"),
    [
        (VIT, None, (224, 224)),
        (CLIP, None, (224, 224)),
        (DINO, None, (256, 224)),
        (CONVNEXT, None, (256, 224)),
        ({**CONVNEXT, "size": {"shortest_edge": 384}}, None, (384, 384)),
        ({"size": 30, "crop_size": 28, "do_center_crop": True}, None, (30, 28)),
        (DINO, 112, (128, 112)),
        (None, 32, (None, 32)),
    ],
)
def test_sizes_are_as_the_backbone_says_or_in_proportion(settings, size, sides):
    pixels = pixels_for(settings, size=size)
    assert (pixels.resize, pixels.size) == sides


def test_colours_are_as_the_backbone_says():
    assert pixels_for(CONVNEXT).std == (0.1, 0.2, 0.4)
    assert pixels_for(VIT).mean == (0.5, 0.5, 0.5)
    assert pixels_for({**VIT, "do_normalize": False}).mean == (0.0, 0.0, 0.0)
    white = [torch.full((3, 8, 8), 255, dtype=torch.uint8)]
    assert pixels_for(None, size=8)(white).unique().tolist() == [1.0]
    assert pixels_for({"do_normalize": False, "do_rescale": False}, size=8)(white).unique().tolist() == pytest.approx(
        [255.0]
    )
    halves = {"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}
    assert torch.allclose(pixels_for(halves, size=8)(white), torch.ones(1, 3, 8, 8))


def test_a_backbone_of_one_channel_is_told_so():
    assert pixels_for(None, size=8, channels=1).mean == (0.5,)
    with pytest.raises(ValueError, match="3 means and the backbone 1 channels"):
        pixels_for(VIT, channels=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "image_size: missing"),
        ({"size": {"height": 8, "width": 16}}, "only squares"),
        ({"size": "large"}, "expected a whole number"),
    ],
)
def test_a_size_that_nobody_says_is_asked_for(settings, said):
    with pytest.raises(ValueError, match=said):
        pixels_for(settings)


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"reading a.png needs an extra: pip install 'mixwright\[vision\]'"):
        decode(Encoded("a.png", data=b""))
