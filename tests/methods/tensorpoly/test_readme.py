"""What the method's README shows runs, in order, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from peft import PolyConfig, get_peft_model

import mixwright.methods.tensorpoly as tensorpoly
from mixwright.backbones.hf import byte_tokenizer
from mixwright.backbones.tiny import tiny_backbone

README = Path(tensorpoly.__file__).with_name("README.md")


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_backbone("llama").save_pretrained("my-backbone")
    byte_tokenizer().save_pretrained("my-backbone")
    poly = PolyConfig(r=2, n_tasks=2, n_skills=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_backbone("llama"), poly).save_pretrained("their-poly")
    words = torch.tensor([[5, 6, 7], [8, 9, 10]])
    names = {"inputs": {"input_ids": words, "labels": words}, "ids": torch.tensor([0, 2]), "sum_ids": words[:1]}
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(README), "exec"), names)
    table, small, cost = (names[name] for name in ("table", "small", "cost"))
    assert len(table) == 14 and all(rows.shape == (3, 4) for rows in table.values())
    assert small.settings.experts == "entangled" and small.settings.groups == 8
    assert cost.trained == cost.stored + cost.router
    assert names["model"].tasks[-1] == "sums" and names["report"].trained == 14 * 4
    assert names["guess"].weights.shape == (1, 4)
    assert (tmp_path / "my-multitask-adapter" / "composition.yaml").is_file()
