"""Whether two tokenizers are the same, by what they do and not by name; and one vocabulary for models that differ.

Models share a hidden stream only if they read the same tokens. Two tokenizers are the same when their vocabularies,
merges, normalisation, splitting and special tokens are; the padding token is left out, since padding is masked.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

_SPECIAL = ("bos_token", "eos_token", "unk_token")
_STEPS = {"normalizer": "normalisation", "pre_tokenizer": "splitting", "post_processor": "tokens put around a text"}


def same_tokenizer(a: Any, b: Any) -> bool:
    """Whether every text becomes the same ids."""
    return not differences(a, b)


def fingerprint(tokenizer: Any) -> str:
    """Equal for tokenizers that are the same: SHA-256 of vocabulary, merges, steps and special tokens."""
    known = {**_described(tokenizer), "vocabulary": sorted(tokenizer.get_vocab().items())}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def differences(a: Any, b: Any) -> tuple[str, ...]:
    """What tells two tokenizers apart, each in a sentence; empty where nothing does."""
    found = list(_vocabularies(a.get_vocab(), b.get_vocab()))
    one, two = _described(a), _described(b)
    if not found and one["merges"] != two["merges"]:
        found.append(_merges(one["merges"], two["merges"]))
    for step, words in _STEPS.items():
        if one[step] != two[step]:
            found.append(f"{words} differs: {_kind(one[step])} against {_kind(two[step])}")
    if one["model"] != two["model"]:
        keys = [key for key in {**one["model"], **two["model"]} if one["model"].get(key) != two["model"].get(key)]
        found.append(f"the models differ in {', '.join(sorted(keys))}")
    for name in _SPECIAL:
        if one[name] != two[name]:
            found.append(f"{name} is {one[name]!r} against {two[name]!r}")
    return tuple(found)


def rows_of(own: Any, shared: Any) -> list[list[int]]:
    """For each token of `shared`, the rows of `own`'s tables whose mean stands for it at first.

    A token whose text `own` has too takes over its row, a special token that of the same role; any other the rows of
    the pieces into which `own` splits its text. Empty for a token that `own` can't say at all.
    """
    vocabulary = own.get_vocab()
    texts_of_own = _texts(own)
    by_text = {text: [i] for i, text in reversed(list(enumerate(texts_of_own))) if "\ufffd" not in text}
    roles = {getattr(shared, name): getattr(own, name) for name in (*_SPECIAL, "pad_token") if getattr(shared, name)}
    special = set(shared.all_special_tokens)
    pieces, texts = shared.convert_ids_to_tokens(list(range(len(shared)))), _texts(shared)
    found: list[list[int]] = []
    for piece, text in zip(pieces, texts, strict=True):
        if piece in special:
            name = roles.get(piece) or piece
            found.append([vocabulary[name]] if name in vocabulary else [])
        elif piece in vocabulary and texts_of_own[vocabulary[piece]] == text:
            found.append([vocabulary[piece]])
        elif text in by_text:
            found.append(by_text[text])
        elif "\ufffd" in text or not text:
            found.append(_bytes_of(piece, vocabulary))
        else:
            found.append(list(own.encode(text, add_special_tokens=False)))
    return found


def _described(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, as plain data, without its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known: Mapping[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = {
        k: v for k, v in known.get("model", {"type": type(tokenizer).__name__}).items() if k not in ("vocab", "merges")
    }
    pairs = [
        pair.split(" ") if isinstance(pair, str) else list(pair) for pair in known.get("model", {}).get("merges", [])
    ]
    return {
        "merges": pairs,
        "model": model,
        **{step: known.get(step) for step in _STEPS},
        **{name: getattr(tokenizer, name, None) for name in _SPECIAL},
    }


def _vocabularies(a: Mapping[str, int], b: Mapping[str, int]) -> Sequence[str]:
    moved = sorted((a[token], token) for token in a.keys() & b.keys() if a[token] != b[token])
    found: list[str] = []
    if moved:
        token = moved[0][1]
        found.append(
            f"{len(moved)} of {len(a)} tokens have other ids, first: {token!r} ({a[token]} against {b[token]})"
        )
    for which, mine, other in (("first", a, b), ("second", b, a)):
        only = sorted((mine[token], token) for token in mine.keys() - other.keys())
        if only:
            found.append(f"{len(only)} of {len(mine)} tokens are in the {which} one only, first: {only[0][1]!r}")
    return found


def _merges(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    shown = [" + ".join(map(repr, rules[at])) if at < len(rules) else "nothing" for rules in (a, b)]
    return f"merges differ from rule {at + 1} on: {shown[0]} against {shown[1]}"


def _kind(step: Any) -> str:
    return "none" if step is None else str(step.get("type", step)) if isinstance(step, Mapping) else str(step)


def _texts(tokenizer: Any) -> list[str]:
    """The text that each token adds behind another: a first token's leading space would be lost."""
    before = tokenizer.encode("a", add_special_tokens=False)[-1:]
    start = len(tokenizer.decode(before, clean_up_tokenization_spaces=False))
    pairs = [[*before, token] for token in range(len(tokenizer))]
    return [text[start:] for text in tokenizer.batch_decode(pairs, clean_up_tokenization_spaces=False)]


def _bytes_of(piece: str, vocabulary: Mapping[str, int]) -> list[int]:
    """A piece that is no whole character: its bytes, where the other vocabulary spells them alike."""
    if piece in vocabulary:
        return [vocabulary[piece]]
    return [vocabulary[letter] for letter in piece if letter in vocabulary]
