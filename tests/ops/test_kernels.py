"""The compiled dispatch against the reference, and what happens where it can't be had. Skipped without a C compiler."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixwright.ops import kernels
from mixwright.ops.dispatch import combine_lora, lora_reference


@pytest.fixture(scope="module")
def function(compiled):
    return compiled.add_lora


def case(tokens, d_in, d_out, experts, rank, k, seed=0):
    make = torch.Generator().manual_seed(seed)
    down = torch.randn(experts, rank, d_in, generator=make) * d_in**-0.5
    up = torch.randn(experts, d_out, rank, generator=make) * rank**-0.5
    values, indices = torch.randn(tokens, experts, generator=make).topk(k, -1)
    return (
        torch.randn(tokens, d_in, generator=make),
        down,
        up,
        torch.rand(experts, generator=make),
        values.softmax(-1),
        indices,
    )


def added(function, arguments):
    x, _, up = arguments[:3]
    start = torch.linspace(-1, 1, x.shape[0] * up.shape[1]).view(x.shape[0], up.shape[1])
    return kernels.add_native(function, start.clone(), *arguments) - start


sizes = st.tuples(*(st.integers(low, high) for low, high in ((0, 60), (1, 70), (1, 300), (1, 6), (1, 40)))).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(1, size[3]), st.integers(0, 99))
)


@settings(deadline=None, max_examples=60)
@given(drawn=sizes)
def test_it_agrees_with_the_reference_at_odd_sizes(function, drawn):
    (tokens, d_in, d_out, experts, rank), k, seed = drawn
    arguments = case(tokens, d_in, d_out, experts, rank, k, seed)
    wide = lora_reference(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments))
    torch.testing.assert_close(added(function, arguments).double(), wide, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [1030, 2064])
def test_it_agrees_at_real_widths(function, width):
    arguments = case(70, width, width + 5, 9, 16, 2)
    torch.testing.assert_close(added(function, arguments), lora_reference(*arguments), atol=1e-5, rtol=1e-5)


def test_experts_without_weight_are_not_read(function):
    x, down, up, scale, weights, indices = case(40, 33, 50, 6, 5, 2)
    weights = torch.where(indices == 4, 0.0, weights)
    expected = lora_reference(x, down, up, scale, weights, indices)
    down[4], up[4], scale[4] = torch.nan, torch.nan, torch.nan
    found = added(function, (x, down, up, scale, weights, indices))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_scratch_memory_does_not_leak(function, monkeypatch):
    arguments = case(40, 33, 50, 6, 5, 2)
    new_empty = torch.Tensor.new_empty
    poison = {True: torch.nan, False: -7}
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda tensor, *sizes: (new := new_empty(tensor, *sizes)).fill_(poison[new.is_floating_point()]),
    )
    torch.testing.assert_close(added(function, arguments), lora_reference(*arguments), atol=1e-5, rtol=1e-5)


def test_the_number_of_threads_does_not_change_a_bit(function):
    arguments = case(70, 100, 700, 9, 16, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = added(function, arguments)
        torch.set_num_threads(3)
        assert torch.equal(added(function, arguments), one)
    finally:
        torch.set_num_threads(threads)


def test_an_index_outside_of_the_pool_is_an_error_and_writes_nothing(function):
    x, down, up, scale, weights, indices = case(4, 5, 6, 3, 2, 2)
    out = torch.zeros(4, 6)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="outside of the 3"):
            kernels.add_native(function, out, x, down, up, scale, weights, indices.clone().fill_(wrong))
    assert (out == 0).all()


def test_the_dispatch_takes_it_where_it_fits(function, monkeypatch, tmp_path):
    del function
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = case(40, 33, 50, 6, 5, 2)
    expected = lora_reference(*arguments)
    monkeypatch.setenv(kernels.SETTING, "built")
    assert kernels.kernel() is None and "nothing is built" in kernels.status()
    monkeypatch.setenv(kernels.SETTING, "auto")
    assert kernels.status().startswith("not built yet")
    calls = []
    native = kernels.add_native
    monkeypatch.setattr(kernels, "add_native", lambda *a: calls.append(1) or native(*a))
    torch.testing.assert_close(combine_lora(*arguments), expected, atol=1e-5, rtol=1e-5)
    assert calls == [1] and kernels.status().startswith("in use: ")
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    combine_lora(*wide)
    combine_lora(arguments[0].requires_grad_(), *arguments[1:]).sum().backward()
    assert calls == [1]


def test_without_a_compiler_torch_does_it_and_doctor_says_so(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(kernels.SETTING, "auto")
    assert "no C compiler" in kernels.status() or "Linux only" in kernels.status()
    with caplog.at_level(logging.INFO):
        assert kernels.kernel() is None
    assert "torch's own path" in kernels.status()
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_is_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho it broke >&2\nexit 1\n")
    fake.chmod(0o700)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv(kernels.SETTING, "auto")
    assert kernels.kernel() is None
    with pytest.raises((kernels.KernelUnavailable), match="it broke|Linux only"):
        kernels.load("auto", tmp_path / "other")


def test_settings_and_other_peoples_files_are_refused(tmp_path):
    with pytest.raises(kernels.KernelUnavailable, match="accepted are auto, built, off"):
        kernels.load("on", tmp_path)
    with pytest.raises(kernels.KernelUnavailable, match="off"):
        kernels.load("off", tmp_path)
    path = kernels.library(tmp_path)
    path.write_bytes(b"")
    path.chmod(0o777)
    with pytest.raises(kernels.KernelUnavailable, match="others may write"):
        kernels.load("built", tmp_path)
