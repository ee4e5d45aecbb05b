"""Backbones and tokenizers of transformers: the only file that imports it, and it does so inside functions.

A folder is data. No code from it is run (`trust_remote_code` is never true), no pickled weights are opened, and fields
of its config that name code, kernels or attention implementations are dropped before transformers sees them.
"""

import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixwright.errors import CatalogError

_CONFIG_LIMIT = 1 << 20
_NAMES_CODE = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "custom_generate",
        "attn_implementation",
        "attn_implementation_internal",
        "experts_implementation",
        "experts_implementation_internal",
        "use_kernels",
        "kernel_config",
        "allow_all_kernels",
    }
)
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_TOKENIZER = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "special_tokens*")
_KINDS = ("auto", "causal", "seq2seq", "speech", "encoder")


def load_backbone(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    kind: str = "auto",
    device_map: Any = None,
) -> nn.Module:
    """A transformers model in eval mode, from a folder or a hub id.

    `kind`: `causal`, `seq2seq`, `speech`, `encoder` (the bare model), or `auto`, which reads it off the config.
    `dtype`: as the weights are stored, unless given. Raises CatalogError (`PATH`, `CONFIG`, `FEATURE`, `FORMAT`,
    `SHAPE`, `INCOMPLETE`) for a folder that is missing, is an adapter, has no safetensors, needs code of its own, or
    lacks weights.
    """
    if kind not in _KINDS:
        raise ValueError(f"backbone kind {kind!r}; expected one of {', '.join(_KINDS)}.")
    folder, commit = _folder(path_or_id, revision)
    name = str(path_or_id)
    settings = _settings(folder, name)
    _check_weights(folder, name)
    config = _config(settings, name)
    loader = _auto_class(kind if kind != "auto" else _kind(config, settings))
    placed = {} if device_map is None else {"device_map": device_map}
    wanted = "auto" if dtype is None else _dtype(dtype)
    try:
        model, info = loader.from_pretrained(
            str(folder),
            config=config,
            dtype=wanted,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **placed,
        )
    except RuntimeError as error:
        raise CatalogError("SHAPE", name, f"the weights do not fit the config ({_short(error)}).") from error
    absent = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if absent:
        raise CatalogError(
            "INCOMPLETE",
            name,
            f"{len(absent)} weights of {type(model).__name__} are not in the files ({', '.join(absent[:3])}); "
            "they would be random. Use complete weights, or another backbone kind.",
        )
    model.config._name_or_path = name
    model.config._commit_hash = commit
    return model.eval()


@contextmanager
def without_bars() -> Generator[None]:
    """Inside the block transformers draws no bars for loading and writing weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_tokenizer(path_or_id: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer beside a backbone. It has a pad token afterwards (the end-of-text token if it had none)."""
    from transformers import AutoTokenizer

    folder, _ = _folder(path_or_id, revision)
    if not any(found for pattern in _TOKENIZER for found in folder.glob(pattern)):  # transformers would make one up
        raise CatalogError(
            "PATH", str(path_or_id), "there is no tokenizer here; expected a file such as tokenizer.json."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CatalogError("PATH", str(path_or_id), f"no tokenizer could be read here ({_short(error)}).") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fetch(path_or_id: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder that a path names, or the local copy of these files of a hub repository (at `revision`).

    Raises CatalogError (PATH) for what is in neither place.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(path_or_id).startswith((".", "~")) or str(path_or_id).count("/") > 1:
        raise CatalogError("PATH", str(path_or_id), "no such folder; expected a folder or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CatalogError(
            "PATH",
            str(path_or_id),
            f"not a folder here, not in the local cache, and the hub did not give it ({_short(error)}). "
            "Check the name and the network, or give a folder.",
        ) from error


def build_backbone(model_type: str, settings: Mapping[str, Any], *, kind: str = "auto", seed: int = 0) -> nn.Module:
    """A model from its config alone, with random weights that depend on `seed` only; nothing is downloaded."""
    config = _config({"model_type": model_type, **settings}, model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _auto_class(kind if kind != "auto" else _kind(config, settings)).from_config(config).eval()


def causal_families() -> dict[str, str]:
    """Every family of causal language models that the installed transformers lists: model type -> class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {str(family): str(names) for family, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def default_settings(model_type: str) -> dict[str, Any]:
    """The fields of a family's config as they are by default."""
    from transformers import CONFIG_MAPPING

    return _config({"model_type": model_type}, model_type).to_dict() if model_type in CONFIG_MAPPING else {}


def read_settings(path_or_id: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The fields of the config in a model's folder, without those that name code. Weights need not be there."""
    folder = fetch(path_or_id, revision, ("config.json",))
    return _config(_settings(folder, str(path_or_id)), str(path_or_id)).to_dict()


def build_as_described(folder: Path, name: str) -> nn.Module:
    """The causal language model of a folder's config, with random weights. Raises CatalogError as `load_backbone`."""
    config = _config(_settings(folder, name), name)
    with torch.random.fork_rng(devices=[]):
        return _auto_class("causal").from_config(config).eval()


def byte_tokenizer(text_model: str = "causal") -> Any:
    """A tokenizer of 256 bytes and four special tokens (pad 0, end 1, start 2, unknown 3), for tests and demos.

    `seq2seq` appends the end token to every text; `encoder` puts start and end around it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"causal": None, "seq2seq": "$A </s>", "encoder": "<s> $A </s>"}[text_model]
    if ends is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=ends, special_tokens=[("<s>", 2), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left" if text_model == "causal" else "right",
        clean_up_tokenization_spaces=False,
    )


def bpe_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer of `size` tokens learnt from `texts`; token 0 ends and pads a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size=size, show_progress=False, special_tokens=[end])
    return PreTrainedTokenizerFast(
        tokenizer_object=learnt._tokenizer, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


def provenance(model: nn.Module) -> dict[str, Any]:
    """Where a backbone came from, as a composition writes it down: `path`, `revision`, `kind`."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    kind = "seq2seq" if getattr(config, "is_encoder_decoder", False) else "encoder"
    if kind == "encoder" and name.endswith(("ForCausalLM", "LMHeadModel")):
        kind = "causal"
    return {
        "path": getattr(config, "_name_or_path", "") or "",
        "revision": getattr(config, "_commit_hash", None),
        "kind": kind,
        "architecture": name,
    }


def _folder(path_or_id: str | Path, revision: str | None) -> tuple[Path, str | None]:
    folder = fetch(path_or_id, revision, _FILES)
    return folder, None if Path(path_or_id).expanduser().is_dir() or len(folder.name) != 40 else folder.name


def _settings(folder: Path, name: str) -> dict[str, Any]:
    if (folder / "adapter_config.json").exists():
        raise CatalogError("FORMAT", name, "this is an adapter, not a backbone; add it with `mixwright experts add`.")
    path = folder / "config.json"
    if not path.is_file():
        raise CatalogError("PATH", name, "there is no config.json; expected a transformers model's folder.")
    if path.stat().st_size > _CONFIG_LIMIT:
        raise CatalogError("SIZE", name, f"config.json has {path.stat().st_size} bytes; at most {_CONFIG_LIMIT}.")
    try:
        settings = json.loads(path.read_text("utf-8"), object_hook=_float)
    except (ValueError, RecursionError) as error:
        raise CatalogError("JSON", name, f"config.json can't be read ({_short(error)}).") from error
    if not isinstance(settings, dict):
        raise CatalogError("CONFIG", name, "config.json is no object.")
    if settings.get("quantization_config"):
        raise CatalogError("FEATURE", name, "the weights are quantised; experts need a backbone in plain precision.")
    return settings


def _float(given: dict[str, Any]) -> Any:
    """transformers 5 writes floats that JSON lacks as `{"__float__": "Infinity"}`: Mamba-2 has one."""
    tag = given.get("__float__") if len(given) == 1 else None
    return _FLOATS.get(tag, given) if isinstance(tag, str) else given


def _check_weights(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
        strange = [s for s in shards if Path(str(s)).name != s or not str(s).endswith(".safetensors")]
        if strange or not all((folder / shard).is_file() for shard in shards):
            raise CatalogError("FORMAT", name, "the index names shards that are no safetensors files of this folder.")
    elif not (folder / "model.safetensors").is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt"))
        raise CatalogError(
            "FORMAT",
            name,
            "no model.safetensors"
            + (f", only {pickled[0]}, which is a pickle and is not opened" if pickled else "")
            + '. Convert it on a machine you can spare: python -c "from transformers import AutoModel; '
            "AutoModel.from_pretrained('IN').save_pretrained('OUT')\".",
        )


def _config(settings: Mapping[str, Any], name: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    known = _without_code(settings)
    model_type = known.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise CatalogError(
            "CONFIG",
            name,
            f"model_type {str(model_type)[:80]!r} is not one that the installed transformers knows by itself; "
            "models that bring their own code are not run.",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(known)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CatalogError("CONFIG", name, f"config.json does not fit {model_type} ({_short(error)}).") from error


def _without_code(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_code(v) for k, v in value.items() if str(k).lstrip("_") not in _NAMES_CODE}
    return [_without_code(item) for item in value] if isinstance(value, list) else value


def _kind(config: Any, settings: Mapping[str, Any]) -> str:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )

    if getattr(config, "is_encoder_decoder", False):
        if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return "seq2seq"
        if config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
            return "speech"
    written = [str(name) for name in settings.get("architectures") or ()]
    if written:
        return "causal" if written[0].endswith(("ForCausalLM", "LMHeadModel")) else "encoder"
    one_way = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
    return "causal" if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and one_way else "encoder"


def _auto_class(kind: str) -> Any:
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "speech": transformers.AutoModelForSpeechSeq2Seq,
        "encoder": transformers.AutoModel,
    }[kind]


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is none of torch's; expected float32, bfloat16 or float16.")
    return found


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
