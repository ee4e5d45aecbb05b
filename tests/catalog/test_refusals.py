"""The table of bad adapters: each is refused with its code, at once, with backbone and catalogue unchanged."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixwright.catalog.store import Catalog
from mixwright.errors import CatalogError
from mixwright.ops.digest import tensor_digest

Case = Callable[[Any, Path], Path]
CASES: dict[str, tuple[str, Case]] = {}


def case(code: str) -> Callable[[Case], Case]:
    def note(write: Case) -> Case:
        CASES[write.__name__] = (code, write)
        return write

    return note


def config_case(name: str, code: str, **changes: Any) -> None:
    def write(good: Any, folder: Path) -> Path:
        good.config.update(changes)
        return good.write(folder)

    CASES[name] = (code, write)


def header_case(name: str, code: str, spoil: Callable[[dict[str, Any], bytes], tuple[Any, bytes]]) -> None:
    def write(good: Any, folder: Path) -> Path:
        header, data = spoil(*good.entries())
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return good.write(folder, weights=good.file(text, data))

    CASES[name] = (code, write)


def entry(header: dict[str, Any], at: int = 0) -> dict[str, Any]:
    return [value for key, value in header.items() if key != "__metadata__"][at]


# Forms that are not opened


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/mixwright-pickle-ran",)


def _only_bin(folder: Path, payload: bytes, good: Any) -> Path:
    good.write(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(payload)
    return folder


@case("FORMAT")
def bin_with_hostile_pickle(good: Any, folder: Path) -> Path:
    return _only_bin(folder, pickle.dumps(Hostile()), good)


@case("FORMAT")
def bin_harmless(good: Any, folder: Path) -> Path:
    return _only_bin(folder, b"harmless", good)


@case("FORMAT")
def no_config(good: Any, folder: Path) -> Path:
    good.write(folder)
    (folder / "adapter_config.json").unlink()
    return folder


@case("FORMAT")
def empty_folder(good: Any, folder: Path) -> Path:
    folder.mkdir()
    return folder


# Values


def _value_case(
    name: str, code: str, spoil: Callable[[torch.Tensor], torch.Tensor], side: str = "lora_B.weight"
) -> None:
    def write(good: Any, folder: Path) -> Path:
        good.tensors[good.first(side)] = spoil(good.tensors[good.first(side)])
        return good.write(folder)

    CASES[name] = (code, write)


def _one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def put(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    return put


_value_case("nan_in_a_weight", "VALUE", _one(float("nan")))
_value_case("infinity_in_a_weight", "VALUE", _one(float("inf")), "lora_A.weight")
_value_case("minus_infinity_in_a_weight", "VALUE", _one(float("-inf")))
_value_case("nan_beside_infinity", "VALUE", lambda tensor: _one(float("inf"))(tensor * float("nan")))
_value_case("values_times_1e18", "VALUE", lambda tensor: tensor * 1e18)
_value_case("nan_in_half", "VALUE", lambda tensor: _one(float("nan"))(tensor).half())
_value_case("nan_in_bfloat16", "VALUE", lambda tensor: _one(float("nan"))(tensor).bfloat16())
_value_case("int8_weight", "DTYPE", lambda tensor: tensor.to(torch.int8))
_value_case("float64_weight", "DTYPE", lambda tensor: tensor.double())
_value_case("float8_weight", "DTYPE", lambda tensor: tensor.to(torch.float8_e4m3fn))
_value_case("transposed", "SHAPE", lambda tensor: tensor.T.contiguous(), "v_proj.lora_B.weight")
_value_case("one_row_too_many", "SHAPE", lambda tensor: torch.cat([tensor, tensor[:1]]), "v_proj.lora_B.weight")
_value_case("wider_input", "SHAPE", lambda tensor: torch.cat([tensor, tensor], 1), "q_proj.lora_A.weight")
_value_case("a_convolution", "SHAPE", lambda tensor: tensor[..., None, None].contiguous())
_value_case("a_vector", "SHAPE", lambda tensor: tensor.reshape(-1))
_value_case("empty_output", "SHAPE", lambda tensor: tensor[:0])

# Numbers of the configuration

for number in (float("nan"), float("inf"), 1e30, -8, 0, "8", None, True, [8], 10**400):
    config_case(f"alpha_{str(number)[:8]}", "ALPHA", lora_alpha=number)
for number in (0, -1, 4.5, "4", 10_000_000, 513, None, True, [4], {}, float("nan"), 10**400):
    config_case(f"rank_{str(number)[:8]}", "RANK", r=number)
config_case("rank_unlike_the_tensors", "SHAPE", r=5)
config_case("rank_of_one_module_out_of_range", "RANK", rank_pattern={"q_proj": 100000})
config_case("rank_of_one_module_is_text", "RANK", rank_pattern={"q_proj": "4"})
config_case("alpha_of_one_module_is_nan", "ALPHA", alpha_pattern={"q_proj": float("nan")})
config_case("rank_of_one_module_unlike_its_tensors", "SHAPE", rank_pattern={"layers.0.q_proj": 2})

# Names

config_case("target_pattern_that_backtracks", "TARGET", target_modules=r"(.*.*)*.*q_proj$x")
config_case("target_list_with_a_pattern", "TARGET", target_modules=["q_proj", "v_proj", r"(a|a)*o_proj"])
config_case("target_pattern_with_a_star", "TARGET", target_modules=["*_proj"])
config_case("target_misspelt", "TARGET", target_modules=["q_proj", "v_proj", "o_proj", "k_porj"])
config_case("target_missing", "TARGET", target_modules=None)
config_case("target_empty", "TARGET", target_modules=[])
config_case("target_is_a_number", "TARGET", target_modules=[3])
config_case("target_of_a_mapping", "TARGET", target_modules={"q_proj": 1})
config_case("exclude_pattern", "TARGET", exclude_modules=".*o_proj")
config_case("rank_pattern_with_a_caret", "TARGET", rank_pattern={"^layers.0.q_proj": 4})
config_case("rank_pattern_that_backtracks", "TARGET", rank_pattern={"(a+)+b": 4})
config_case("rank_pattern_for_nothing", "TARGET", rank_pattern={"k_proj": 4})
config_case("alpha_pattern_for_nothing", "TARGET", alpha_pattern={"layers.7.q_proj": 4})
config_case("tensors_of_other_modules", "TENSOR", target_modules=["q_proj", "v_proj"])
config_case("tensors_of_excluded_modules", "TENSOR", exclude_modules=["layers.1.o_proj"])

# Features

for feature, value in {
    "use_dora": True, "lora_bias": True, "bias": "all", "modules_to_save": ["lm_head"], "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts"], "layers_to_transform": [0], "layers_pattern": "layers",
    "layer_replication": [[0, 1_000_000_000]], "alora_invocation_tokens": [1], "use_qalora": True,
    "use_bdlora": {"nblocks": 2}, "kasa_config": {"a": 1}, "arrow_config": {"a": 1}, "velora_config": {"a": 1},
    "monteclora_config": {"a": 1}, "megatron_config": {"a": 1}, "megatron_core": "os.path", "loftq_config": {"bits": 4},
    "eva_config": {"rho": 2.0}, "corda_config": {"a": 1}, "lora_ga_config": {"a": 1}, "ensure_weight_tying": True,
    "enable_lora": [True], "merge_weights": True,
}.items():  # fmt: skip
    config_case(f"feature_{feature}", "FEATURE", **{feature: value})
for scheme in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "lora_ga", "mica", "something_new", 3, None):
    config_case(f"init_{scheme}", "FEATURE", init_lora_weights=scheme)
config_case("bias_lora_only", "FEATURE", bias="lora_only")

# The configuration as a whole

config_case("unknown_key", "CONFIG", user_rslora=True)
config_case("unknown_key_of_another_method", "CONFIG", tokenizer_kwargs={"trust_remote_code": True})
config_case("peft_type_missing", "CONFIG", peft_type=None)
config_case("peft_type_unknown", "CONFIG", peft_type="LORA2")
config_case("peft_type_xlora", "CONFIG", peft_type="XLORA")
config_case("peft_type_poly", "CONFIG", peft_type="POLY")
config_case("peft_type_list", "CONFIG", peft_type=["LORA"])
config_case("task_type_unknown", "CONFIG", task_type="MIND_READING")
config_case("rslora_is_text", "CONFIG", use_rslora="true")
config_case("dropout_of_two", "CONFIG", lora_dropout=2)
config_case("auto_mapping_is_text", "CONFIG", auto_mapping="os.system")
config_case("base_model_is_a_list", "CONFIG", base_model_name_or_path=["a"])
config_case("fan_in_fan_out_on_linear_layers", "CONFIG", fan_in_fan_out=True)


def _config_text(name: str, code: str, text: Callable[[dict[str, Any]], bytes]) -> None:
    CASES[name] = (code, lambda good, folder: good.write(folder, config=text(good.config)))


_config_text("config_of_50_megabytes", "SIZE", lambda _: b"{" + b" " * 50_000_000 + b"}")
_config_text("config_too_deep", "JSON", lambda _: b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
_config_text("config_cut_off", "JSON", lambda config: json.dumps(config).encode()[:-9])
_config_text("config_empty", "JSON", lambda _: b"")
_config_text("config_a_list", "JSON", lambda config: json.dumps([config]).encode())
_config_text("config_not_utf8", "JSON", lambda config: json.dumps(config).encode() + b"\xff\xfe")
_config_text("config_huge_number", "JSON", lambda _: b'{"r": ' + b"9" * 6000 + b"}")
_config_text("config_backslashes", "JSON", lambda _: b'{"' + b'\\"' * 120_000)
_config_text("config_name_twice", "DUP", lambda config: json.dumps(config).encode()[:-1] + b', "r": 8}')

# Which tensors


@case("INCOMPLETE")
def no_tensors(good: Any, folder: Path) -> Path:
    good.tensors = {}
    return good.write(folder)


@case("INCOMPLETE")
def half_the_layers(good: Any, folder: Path) -> Path:
    good.tensors = {name: tensor for name, tensor in good.tensors.items() if "layers.0." in name}
    return good.write(folder)


@case("INCOMPLETE")
def one_site_missing_under_all_linear(good: Any, folder: Path) -> Path:
    good.config["target_modules"] = "all-linear"
    good.tensors = {name: tensor for name, tensor in good.tensors.items() if "layers.1.o_proj" not in name}
    return good.write(folder)


@case("INCOMPLETE")
def lora_b_missing(good: Any, folder: Path) -> Path:
    good.tensors = {name: tensor for name, tensor in good.tensors.items() if "lora_B" not in name}
    return good.write(folder)


@case("INCOMPLETE")
def one_lora_a_missing(good: Any, folder: Path) -> Path:
    del good.tensors[good.first("lora_A.weight")]
    return good.write(folder)


@case("INCOMPLETE")
def foreign_names(good: Any, folder: Path) -> Path:
    good.tensors = {f"something.{at}": tensor for at, tensor in enumerate(good.tensors.values())}
    return good.write(folder)


@case("INCOMPLETE")
def names_of_another_architecture(good: Any, folder: Path) -> Path:
    good.rename("layers.", "decoder.block.")
    return good.write(folder)


@case("TENSOR")
def one_layer_too_many(good: Any, folder: Path) -> Path:
    for name in [name for name in good.tensors if "layers.1." in name]:
        good.tensors[name.replace("layers.1.", "layers.2.")] = good.tensors[name]
    return good.write(folder)


def _stray(name: str, tensor: str, shape: tuple[int, ...]) -> None:
    def write(good: Any, folder: Path) -> Path:
        good.tensors[tensor] = torch.zeros(shape)
        return good.write(folder)

    CASES[name] = ("TENSOR", write)


_stray("base_layer_inside", "base_model.model.layers.0.q_proj.base_layer.weight", (8, 8))
_stray("lm_head_inside", "base_model.model.lm_head.weight", (5, 8))
_stray("bare_lm_head_inside", "lm_head.weight", (5, 8))
_stray("backbone_bias_inside", "base_model.model.layers.0.v_proj.bias", (16,))
_stray("saved_module_inside", "base_model.model.lm_head.modules_to_save.default.weight", (5, 8))
_stray("original_module_inside", "base_model.model.lm_head.original_module.weight", (5, 8))
_stray("magnitude_inside", "base_model.model.layers.0.q_proj.lora_magnitude_vector", (8,))
_stray("embedding_factor_inside", "base_model.model.embed.lora_embedding_A", (4, 8))
_stray("lora_bias_inside", "base_model.model.layers.0.q_proj.lora_B.bias", (8,))
_stray("path_that_climbs", "../../layers.0.q_proj.lora_A.weight", (4, 8))
_stray("name_with_a_zero_byte", "base_model.model.layers.0.q_proj\0.lora_A.weight", (4, 8))
_stray("empty_name", "", (1,))
_stray("base_layer_under_a_factor", "base_model.model.layers.0.q_proj.base_layer.lora_A.weight", (4, 8))


@case("TENSOR")
def only_the_head(good: Any, folder: Path) -> Path:
    good.tensors = {"base_model.model.lm_head.weight": torch.zeros(5, 8)}
    return good.write(folder)


@case("DUP")
def one_site_under_two_names(good: Any, folder: Path) -> Path:
    name = good.first("lora_A.weight")
    good.tensors[name.removeprefix("base_model.model.")] = good.tensors[name]
    return good.write(folder)


@case("DUP")
def two_adapters_in_one_file(good: Any, folder: Path) -> Path:
    good.tensors = {
        name.replace(".weight", f".{'a' if 'layers.0' in name else 'b'}.weight"): tensor
        for name, tensor in good.tensors.items()
    }
    return good.write(folder)


# The bytes of the file


def _twice(header: dict[str, Any], data: bytes) -> tuple[bytes, bytes]:
    name, value = next(item for item in header.items() if item[0] != "__metadata__")
    return json.dumps(header).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}".encode(), data


def _changed(at: int = 0, **changes: Any) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
    def spoil(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        entry(header, at).update(changes)
        return header, data

    return spoil


def _moved(by: int) -> Callable[[dict[str, Any], bytes], tuple[Any, bytes]]:
    def spoil(header: dict[str, Any], data: bytes) -> tuple[Any, bytes]:
        begin, end = entry(header, 1)["data_offsets"]
        entry(header, 1)["data_offsets"] = [begin + by, end + by]
        return header, data

    return spoil


header_case("name_twice", "DUP", _twice)
header_case("overlap", "HEADER", _moved(-4))
header_case("hole", "HEADER", _moved(4))
header_case("trailing_bytes", "HEADER", lambda header, data: (header, data + b"MZ"))
header_case("data_cut_off", "HEADER", lambda header, data: (header, data[:-1]))
header_case("offsets_backwards", "HEADER", _changed(data_offsets=[128, 0]))
header_case("offsets_negative", "HEADER", _changed(data_offsets=[-128, 0]))
header_case("offsets_huge", "HEADER", _changed(data_offsets=[0, 2**64]))
header_case("offsets_of_one", "HEADER", _changed(data_offsets=[0]))
header_case("offsets_in_floats", "HEADER", _changed(data_offsets=[0.0, 128.0]))
header_case("offsets_missing", "HEADER", lambda header, data: ({**header, "x": {"dtype": "F32", "shape": [1]}}, data))
header_case("one_key_too_many", "HEADER", _changed(note="x"))
header_case("shape_overflows", "HEADER", _changed(shape=[2**62, 2**62]))
header_case("shape_negative", "HEADER", _changed(shape=[-4, -8]))
header_case("shape_of_true", "HEADER", _changed(shape=[True, 32]))
header_case("shape_with_text", "HEADER", _changed(shape=["4", 8]))
header_case("shape_of_many_axes", "HEADER", _changed(shape=[1] * 40))
header_case("dtype_unknown", "DTYPE", _changed(dtype="F31"))
header_case("dtype_a_number", "DTYPE", _changed(dtype=32))
header_case("metadata_not_text", "HEADER", lambda header, data: ({**header, "__metadata__": {"a": 1}}, data))
header_case("metadata_a_list", "HEADER", lambda header, data: ({**header, "__metadata__": []}, data))
header_case("entry_is_null", "HEADER", lambda header, data: ({**header, "x": None}, data))
header_case("name_very_long", "HEADER", lambda header, data: ({**header, "x" * 600: entry(header)}, data))
header_case("header_of_nan", "HEADER", lambda _, data: (b'{"a": NaN}', data))
header_case("header_no_object", "HEADER", lambda header, data: (b"[1]", data))
header_case("header_begins_with_a_space", "HEADER", lambda header, data: (b" " + json.dumps(header).encode(), data))
header_case("header_not_utf8", "HEADER", lambda header, data: (b'{"\xff": 1}', data))
header_case("header_too_deep", "HEADER", lambda _, data: (b'{"a":' + b"[" * 900_000, data))
header_case(
    "many_empty_tensors",
    "HEADER",
    lambda _, data: ({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(40_000)}, data),
)


@case("HEADER")
def header_of_99_megabytes(good: Any, folder: Path) -> Path:
    good.write(folder, weights=(99_000_000).to_bytes(8, "little") + b"{")
    os.truncate(folder / "adapter_model.safetensors", 99_000_008)
    return folder


@case("HEADER")
def header_longer_than_the_file(good: Any, folder: Path) -> Path:
    return good.write(folder, weights=(10_000).to_bytes(8, "little") + b"{}")


@case("HEADER")
def seven_bytes(good: Any, folder: Path) -> Path:
    return good.write(folder, weights=b"\2\0\0\0\0\0\0")


@case("HEADER")
def empty_file(good: Any, folder: Path) -> Path:
    return good.write(folder, weights=b"")


# Paths


def _link(good: Any, folder: Path, name: str) -> Path:
    elsewhere = good.write(folder.with_name("elsewhere"))
    good.write(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(elsewhere / name)
    return folder


@case("PATH")
def weights_are_a_link(good: Any, folder: Path) -> Path:
    return _link(good, folder, "adapter_model.safetensors")


@case("PATH")
def config_is_a_link(good: Any, folder: Path) -> Path:
    return _link(good, folder, "adapter_config.json")


@case("PATH")
def folder_is_a_link(good: Any, folder: Path) -> Path:
    folder.symlink_to(good.write(folder.with_name("elsewhere")))
    return folder


def _pipe(good: Any, folder: Path, name: str) -> Path:
    good.write(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    return folder


@case("PATH")
def weights_are_a_pipe(good: Any, folder: Path) -> Path:
    return _pipe(good, folder, "adapter_model.safetensors")


@case("PATH")
def config_is_a_pipe(good: Any, folder: Path) -> Path:
    return _pipe(good, folder, "adapter_config.json")


@case("PATH")
def gates_are_a_pipe(good: Any, folder: Path) -> Path:
    good.write(folder)
    os.mkfifo(folder / "gate.safetensors")
    return folder


@case("PATH")
def config_is_a_folder(good: Any, folder: Path) -> Path:
    good.write(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").mkdir()
    return folder


@case("PATH")
def weights_are_a_device(good: Any, folder: Path) -> Path:
    good.write(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/dev/zero")
    return folder


@case("PATH")
def no_such_folder(good: Any, folder: Path) -> Path:
    return folder


@case("PATH")
def a_file(good: Any, folder: Path) -> Path:
    folder.write_bytes(good.weights())
    return folder


# What came with it


@case("HASH")
def card_of_another_file(good: Any, folder: Path) -> Path:
    catalog = Catalog(folder.with_name("other"))
    catalog.add(good.write(folder.with_name("source")), expert_id="x")
    weights = folder.with_name("other") / "experts" / "x" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-20] ^= 1
    weights.write_bytes(data)
    return weights.parent


@case("JSON")
def card_is_no_json(good: Any, folder: Path) -> Path:
    good.write(folder)
    (folder / "card.json").write_bytes(b"{'id': 1}")
    return folder


@case("HASH")
def card_without_seal(good: Any, folder: Path) -> Path:
    good.write(folder)
    (folder / "card.json").write_bytes(b'{"id": "x"}')
    return folder


def _gates(good: Any, folder: Path, gates: dict[str, torch.Tensor]) -> Path:
    good.write(folder)
    good.tensors = gates
    (folder / "gate.safetensors").write_bytes(good.weights())
    return folder


def _all_gates(good: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): torch.zeros(tensor.shape[1])
        for name, tensor in good.tensors.items()
        if "lora_A" in name
    }


@case("INCOMPLETE")
def a_gate_missing(good: Any, folder: Path) -> Path:
    return _gates(good, folder, dict(list(_all_gates(good).items())[1:]))


@case("TENSOR")
def a_gate_for_nothing(good: Any, folder: Path) -> Path:
    return _gates(good, folder, _all_gates(good) | {"lm_head": torch.zeros(8)})


@case("SHAPE")
def a_gate_too_wide(good: Any, folder: Path) -> Path:
    return _gates(good, folder, _all_gates(good) | {"layers.0.q_proj": torch.zeros(9)})


@case("DTYPE")
def a_gate_in_half(good: Any, folder: Path) -> Path:
    return _gates(good, folder, _all_gates(good) | {"layers.0.q_proj": torch.zeros(8).half()})


@case("VALUE")
def a_gate_of_nan(good: Any, folder: Path) -> Path:
    return _gates(good, folder, _all_gates(good) | {"layers.0.q_proj": torch.full((8,), float("nan"))})


CODE = {"os.system", "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class", "exec", "compile"}
REACH = {"subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "shutil.rmtree", "os.rename"}


class Watch:
    """What the interpreter was asked to run, to reach or to write while `on`. A hook cannot be taken away."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CODE or event in REACH or writes:
            self.events.append(f"{event} {arguments!r:.80}")


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.mark.parametrize("name", CASES)
def test_bad_adapter_is_refused(
    name: str, tmp_path: Path, catalog: Catalog, backbone: Any, specimen: Any, tree: Any, no_hang: Any, watch: Watch
) -> None:
    code, write = CASES[name]
    catalog.add(specimen(seed=5).write(tmp_path / "first"))
    folder = write(specimen(), tmp_path / "x")
    catalogue, weights = tree(catalog.folder), tensor_digest(backbone)
    watch.events.clear()
    with no_hang(2.0), pytest.raises(CatalogError) as refusal:
        watch.on = True
        try:
            catalog.add(folder)
        finally:
            watch.on = False
    assert not watch.events
    error = refusal.value
    assert error.code == code, str(error)
    for line in (str(error), *getattr(error, "__notes__", ())):
        assert len(line) <= 400 and line.isprintable() and line.split(" ")[0].isupper()
    assert len(getattr(error, "__notes__", ())) < 20
    assert tree(catalog.folder) == catalogue and tensor_digest(backbone) == weights
    assert not os.path.exists("/tmp/mixwright-pickle-ran")
    assert not any((catalog.folder / ".staging").iterdir())


def test_the_good_one_is_accepted(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    """The control of the table above: what all its cases spoil."""
    assert catalog.add(specimen().write(tmp_path / "x")).id == "x"


def test_faults_are_collected(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    bad = specimen()
    bad.config.update(r=0, lora_alpha=-1, use_dora=True, some_key=1)
    with pytest.raises(CatalogError) as refusal:
        catalog.add(bad.write(tmp_path / "x"))
    codes = {refusal.value.code, *(note.split(" ")[0] for note in refusal.value.__notes__)}
    assert codes == {"RANK", "ALPHA", "FEATURE", "CONFIG"}


def test_untrusted_text_is_cut_and_escaped(tmp_path: Path, catalog: Catalog, specimen: Any) -> None:
    bad = specimen()
    bad.config["\x1b[2J\u202e\ud800" + "x" * 5000] = 1
    with pytest.raises(CatalogError) as refusal:
        catalog.add(bad.write(tmp_path / "x"))
    text = str(refusal.value)
    assert "\x1b" not in text and "\\x1b[2J\\u202e\\ud800" in text and "x" * 80 not in text
    text.encode()


def test_a_naive_loader_accepts_many_of_them(tmp_path: Path, specimen: Any, no_hang: Any) -> None:
    """The broken twin: reading with safetensors and json alone lets cases through, so the table bites."""
    from safetensors.torch import load_file

    let_through: set[str] = set()
    for name, (_, write) in CASES.items():
        if name.startswith(("feature_", "value", "nan", "target_", "base_layer", "name_twice")) and "pipe" not in name:
            folder = write(specimen(), tmp_path / name)
            try:
                load_file(folder / "adapter_model.safetensors")
                json.loads((folder / "adapter_config.json").read_bytes())
            except Exception:
                continue
            let_through.add(name)
    assert {"name_twice", "base_layer_inside", "nan_in_a_weight", "feature_use_dora"} <= let_through
