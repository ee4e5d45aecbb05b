"""The GPU kernels under Triton's interpreter, and what happens without Triton."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mixwright.errors import MissingExtra
from mixwright.ops import gpu


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_their_references():
    """Values, gradients, ties, determinism; which twin is interpreted is decided as triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "MIXWRIGHT_KERNELS": "off"}
    environment["PYTHONPATH"] = str(Path(gpu.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name("triton_cases.py"))],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "as the references have it\n"


def test_without_triton_torch_does_it_and_says_so_once(monkeypatch, caplog):
    for name in [name for name in sys.modules if name == "triton" or name.startswith("mixwright.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpu, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(gpu, "_there", gpu.cache(gpu._there.__wrapped__))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert gpu.neuron_passes(torch.ones(2, 3), torch.ones(4, 2, 3)) is None
    assert len(caplog.messages) == 1 and "pip install 'mixwright[gpu]'" in caplog.messages[0]
    with pytest.raises(MissingExtra):
        import mixwright.ops.triton  # noqa: F401  (the import is what raises)


def test_tensors_on_a_cpu_are_not_for_it(monkeypatch):
    monkeypatch.setattr(gpu, "_there", None)
    assert gpu.neuron_passes(torch.ones(2, 3), torch.ones(4, 2, 3)) is None
    assert gpu.best_keys(torch.ones(1, 1, 2, 3), torch.ones(1, 4, 3), torch.ones(1, 4, 3), 2, None, None) is None


@pytest.mark.gpu
def test_a_gpu_has_what_the_reference_has():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from mixwright.ops.neuron import combine_neurons
    from mixwright.ops.neuron_reference import neurons_reference
    from mixwright.ops.product_key import product_key_top_k_reference
    from mixwright.ops.route import route

    x, rows = torch.randn(50, 96), torch.randn(400, 2, 96)
    weights, indices = torch.randn(50, 16), torch.randint(400, (50, 16))
    results = []
    for device, function in (("cuda", combine_neurons), ("cpu", neurons_reference)):
        given = [t.to(device).requires_grad_() for t in (x, rows, weights)]
        out = function(*given, indices.to(device), "gelu")
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))
    queries, first, second = (
        torch.randn(50, 4, 2, 32).round(),
        torch.randn(4, 90, 32).round(),
        torch.randn(4, 70, 32).round(),
    )
    found = route(queries.cuda(), first.cuda(), second.cuda(), 16)
    halves = [torch.einsum("thd,hnd->thn", queries[:, :, side], keys) for side, keys in enumerate((first, second))]
    assert torch.equal(found.indices.cpu(), product_key_top_k_reference(*halves, 16).indices)
