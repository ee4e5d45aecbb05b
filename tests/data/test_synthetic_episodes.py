import pytest
import torch

from mixwright.data.episode_samplers import FixedEpisodes
from mixwright.data.episodes import check_episode
from mixwright.data.synthetic_episodes import image_domains, text_domains
from mixwright.data.texts import TextReader


class Letters:
    """A tokenizer: one token for each letter."""

    pad_token_id, eos_token_id = 0, None
    calls = 0

    def __call__(self, text=None, **kwargs):
        Letters.calls += len(text)
        return {"input_ids": [[ord(letter) for letter in one][: kwargs["max_length"]] for one in text]}


def test_every_domain_has_the_pictures_that_were_asked_for_and_none_twice():
    domains = image_domains(classes=5, items=4, size=16)
    contents = [content for domain in domains.values() for content in domain.contents]
    assert len(set(contents)) == len(contents) == 6 * 5 * 4
    for domain in domains.values():
        assert domain.items.shape == (20, 3, 16, 16) and domain.items.dtype == torch.uint8
        assert [len(rows) for rows in domain.rows] == [4] * 5
        assert domain.items.float().std() > 10


def test_the_same_seed_gives_the_same_pictures_and_another_gives_others():
    (one,), (same,), (other,) = (
        image_domains(["dots"], classes=3, items=3, size=8, seed=s).values() for s in (0, 0, 1)
    )
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("name", "least"), [("strokes", 0.7), ("negative", 0.5), ("dots", 0.7), ("cells", 0.8), ("bars", 0.6)]
)
def test_a_class_can_be_told_from_its_pixels(name, least):
    source = FixedEpisodes(domains=[*image_domains([name], size=16).values()], ways=5, shots=3, queries=5)
    found = []
    for index in range(10):
        episode = source.episode(index)
        check_episode(episode)
        support, query = episode.support.flatten(1), episode.query.flatten(1)
        prototypes = torch.stack([support[episode.labels == way].mean(0) for way in range(5)])
        found.append((torch.cdist(query, prototypes).argmin(1) == episode.query_labels).float().mean())
    assert least < torch.stack(found).mean() < 1.0


def test_sentences_are_read_through_a_tokenizer_each_of_them_once():
    domain = text_domains(["chat"], classes=3, items=4)["chat"].with_reader(TextReader(Letters(), max_length=30))
    assert len(set(domain.items)) == 12 and domain.items[0].startswith("> ") and domain.items[0].isascii()
    Letters.calls = 0
    for index in range(4):
        episode = FixedEpisodes(domains=[domain], ways=3, shots=2, queries=2).episode(index)
        check_episode(episode)
        assert episode.support["input_ids"].shape == episode.support["attention_mask"].shape == (6, 30)
    assert Letters.calls <= 12


def test_texts_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match="domain notes: its items are no tensors"):
        text_domains(["notes"])["notes"].read([0])


@pytest.mark.parametrize("make", [image_domains, text_domains])
def test_an_unknown_domain_names_those_there_are(make):
    with pytest.raises(ValueError, match="'glyphs' is no synthetic .* there are"):
        make(["glyphs"])
