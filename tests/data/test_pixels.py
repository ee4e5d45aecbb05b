import pytest
import torch
from torch import Generator

from mixwright.data.pixels import (
    PHOTOS,
    SHAPES,
    Augmentation,
    Pixels,
    centre_cut,
    random_cut,
    translated,
    with_channels,
)


def picture(height=12, width=12, channels=3, seed=0):
    generator = Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator, dtype=torch.uint8)


def seeded(seed=0):
    return Generator().manual_seed(seed)


def test_an_image_of_the_size_is_only_normalised():
    image = picture()
    read = Pixels(size=12, mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))([image])
    expected = (image / 255 - torch.tensor([0.5, 0.25, 0.0])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[
        :, None, None
    ]
    assert torch.equal(read[0], expected)


def test_images_of_many_sizes_become_one_batch():
    images = [picture(), picture(5, 40), picture(40, 5, 1), picture(1, 1)]
    assert Pixels(size=8, resize=10)(images).shape == (4, 3, 8, 8)
    assert Pixels(size=8, augmentation=PHOTOS)(images, seeded()).shape == (4, 3, 8, 8)


def test_the_centre_is_what_is_cut_out():
    image = torch.zeros(1, 8, 24, dtype=torch.uint8)
    image[:, :, 8:16] = 255
    assert torch.equal(centre_cut(image, 8, 8), torch.ones(1, 8, 8))
    wide = centre_cut(image.transpose(1, 2), 8, 16)  # brought to 16 x 48, of which rows 20 to 27 are kept
    assert wide.shape == (1, 8, 8) and bool((wide > 0.9).all())


def test_grey_becomes_colour_and_colour_grey():
    grey = picture(channels=1)
    assert torch.equal(with_channels(grey, 3), grey.expand(3, -1, -1))
    green = torch.zeros(3, 2, 2, dtype=torch.uint8)
    green[1] = 200
    assert with_channels(green, 1).unique().tolist() == [117]
    with pytest.raises(ValueError, match="4 channels, and the model reads 3"):
        with_channels(picture(channels=4), 3)


def test_reading_without_a_generator_never_augments():
    images = [picture(), picture(20, 30)]
    plain, varied = Pixels(size=12), Pixels(size=12, augmentation=PHOTOS)
    assert torch.equal(plain(images), varied(images))
    assert not torch.equal(plain(images), varied(images, seeded()))
    assert torch.equal(plain(images), plain(images, seeded()))


def test_augmentation_follows_from_the_generator():
    images, reader = [picture()], Pixels(size=12, augmentation=PHOTOS)
    assert torch.equal(reader(images, seeded(3)), reader(images, seeded(3)))
    assert not torch.equal(reader(images, seeded(3)), reader(images, seeded(4)))


def test_mirrors_only_where_it_is_allowed():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4)[None, None].expand(1, 64, 64)
    slopes = [
        (cut[0, :, -1] - cut[0, :, 0]).mean().item() > 0
        for flip in (False, True)
        for seed in range(12)
        for cut in [random_cut(ramp, 32, Augmentation(flip=flip, jitter=0.0), seeded(seed))]
    ]
    assert all(slopes[:12]) and 0 < sum(slopes[12:]) < 12


def test_a_cut_keeps_the_share_that_was_asked_for():
    whole = Augmentation(crop=1.0, flip=False, jitter=0.0)
    ramp = torch.arange(64, dtype=torch.uint8).mul(4)[None, None].expand(1, 64, 64)
    spans = [
        random_cut(ramp, 64, settings, seeded(s))[0, 0].diff().mean() for settings in (whole, PHOTOS) for s in range(8)
    ]
    widest, narrowed = torch.stack(spans[:8]), torch.stack(spans[8:])
    assert widest.mean() > narrowed.mean() * 1.1  # a smaller part, enlarged, rises more slowly
    assert SHAPES.crop > PHOTOS.crop and not SHAPES.flip


def test_adaptation_moves_images_by_whole_pixels_and_lets_gradients_through():
    images = torch.ones(6, 3, 16, 16, requires_grad=True)
    moved = translated(images, seeded(1), probability=1.0)
    assert moved.shape == images.shape and not torch.equal(moved[0], moved[1])
    empty = (moved[:, 0] == 0).flatten(1).sum(1)
    assert bool((empty <= 16 * 16 - 14 * 14).all()) and int(empty.max()) > 0
    moved.sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all())
    assert torch.equal(translated(images, seeded(1), probability=0.0), images)
    assert torch.equal(translated(images, seeded(5)), translated(images, seeded(5)))
