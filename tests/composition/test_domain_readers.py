import json
from typing import Any

import pytest
import torch

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.image_settings import image_side, load_image_settings
from mixwright.backbones.tiny import tiny_backbone
from mixwright.composition.domain_readers import DomainReaders, content_of
from mixwright.data.domains import Domain, tensor_domain
from mixwright.data.encoded import Encoded
from mixwright.data.pixels import PHOTOS
from mixwright.data.synthetic_episodes import image_domains, text_domains
from mixwright.errors import CatalogError


def domains() -> tuple[Domain, Domain]:
    (images,) = image_domains(["dots"], classes=2, items=2, size=20).values()
    (texts,) = text_domains(["notes"], classes=2, items=2).values()
    return images.with_reader(None), texts


def test_images_are_read_as_the_config_says_where_nothing_lies_beside_the_backbone(tmp_path):
    images, _ = domains()
    vit = tiny_backbone("vit")
    read = DomainReaders.beside(vit, tmp_path, [images]).read(images).read([0, 3])
    assert read.shape == (2, 3, 16, 16) and image_side(vit) == 16
    assert -1 <= float(read.min()) < -0.9
    assert vit(read).last_hidden_state.isfinite().all()


def test_what_lies_beside_the_backbone_is_followed_and_a_size_may_be_asked_for(tmp_path):
    images, _ = domains()
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": 12, "image_mean": [0, 0, 0], "image_std": 2})
    )
    readers = DomainReaders.beside(tiny_backbone("vit"), tmp_path, [images])
    read = readers.read(images).read([0])
    assert read.shape == (1, 3, 12, 12) and float(read.min()) >= 0 and float(read.max()) <= 0.5
    assert (
        DomainReaders.beside(tiny_backbone("vit"), tmp_path, [images], image_size=8).read(images).read([0]).shape[-1]
        == 8
    )


def test_texts_are_read_through_the_tokenizer_beside_the_backbone(tmp_path):
    _, texts = domains()
    byte_tokenizer().save_pretrained(tmp_path)
    read: Any = DomainReaders.beside(tiny_backbone("bert"), tmp_path, [texts], length=9).read(texts).read([0, 1])
    assert read["input_ids"].shape == read["attention_mask"].shape == (2, 9)
    with pytest.raises(CatalogError, match="there is no tokenizer here"):
        DomainReaders.beside(tiny_backbone("bert"), tmp_path / "..", [texts])
    with pytest.raises(ValueError, match="no tokenizer beside the backbone"):
        DomainReaders(tiny_backbone("bert")).read(texts)


def test_only_augmenting_readers_vary_images():
    images, _ = domains()
    readers = DomainReaders(tiny_backbone("vit"))
    plain, varied = readers.read(images), readers.augmenting(PHOTOS).read(images)
    assert torch.equal(plain.read([0]), plain.read([0], torch.Generator().manual_seed(1)))
    assert torch.equal(plain.read([0]), varied.read([0]))
    assert not torch.equal(plain.read([0]), varied.read([0], torch.Generator().manual_seed(1)))


def test_what_was_read_is_kept_together_for_all_domains():
    one, other = (Domain(name, [Encoded("a.png", data=b"")] * 2, [0, 1], ("a", "b")) for name in "xy")
    readers = DomainReaders(tiny_backbone("vit"))
    assert readers.read(one).reader is readers.read(other).reader


def test_a_domain_of_numbers_is_left_as_it_is():
    numbers = tensor_domain("numbers", torch.zeros(2, 5), [0, 1])
    assert DomainReaders(tiny_backbone("bert")).read(numbers) is numbers
    assert content_of(tensor_domain("ids", {"input_ids": torch.zeros(2, 5)}, [0, 1])) == "values"


@pytest.mark.parametrize(
    ("kind", "which", "said"), [("bert", 0, "dots holds images, .* reads texts"), ("vit", 1, "notes holds texts")]
)
def test_the_wrong_kind_of_domain_is_refused(kind, which, said):
    with pytest.raises(ValueError, match=said):
        DomainReaders(tiny_backbone(kind)).read(domains()[which])


@pytest.mark.parametrize("text", ["[1]", "{", "\xff", '{"a":' * 5000])
def test_faulty_settings_beside_a_backbone_are_refused(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CatalogError, match="preprocessor_config.json"):
        load_image_settings(tmp_path)
