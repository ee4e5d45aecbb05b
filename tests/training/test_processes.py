"""Training in other processes: killed at random moments, and spread over two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone
from mixwright.yaml12 import write_yaml

HERE = Path(__file__).parent


def python(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit_and_the_naive_twin_fails(tmp_path: Path) -> None:
    out = python(str(HERE / "kill_harness.py"), str(tmp_path), "8")
    sound, naive = (json.loads(line) for line in out.splitlines())
    assert sound["kills"] == 8 and sound["failed"] == sound["unequal"] == 0
    assert naive["failed"] + naive["unequal"] > 0


@pytest.mark.slow
def test_two_processes_equal_one_with_accumulation(tmp_path: Path) -> None:
    script = str(HERE / "two_processes.py")
    python(script, str(tmp_path / "one.safetensors"), "2")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    python(*launch, script, str(tmp_path / "two.safetensors"), "1")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() <= 1e-6, name


@pytest.mark.slow
def test_two_processes_save_one_composition(tmp_path: Path) -> None:
    tiny_backbone("llama").save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    for name in ("a", "b"):
        rows = [json.dumps({"prompt": f"{name}{n}:", "completion": name * (1 + n % 3)}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    content = {
        "method": "tensorpoly",
        "backbone": str(tmp_path / "backbone"),
        "data": {"tasks": {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b")}, "max_length": 16},
        "config": {"rank": 2, "num_latent": 2, "steps": 4, "target_modules": ["q_proj"]},
    }
    (tmp_path / "recipe.yaml").write_text(write_yaml(content))
    verb = ("mixwright", "train", str(tmp_path / "recipe.yaml"), "--set")
    python("-m", *verb, f"output_dir={tmp_path / 'one'}", "--set", "train.accumulate=2")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m")
    python(*launch, *verb, f"output_dir={tmp_path / 'two'}")
    one, two = (load_file(tmp_path / run / "multitask/composition/added.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and all((one[name] - two[name]).abs().max() <= 1e-6 for name in one)
