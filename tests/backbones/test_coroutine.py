"""Both back-ends keep the same promises: order, errors, cleaning up, and the modes of torch."""

import contextvars
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixwright.backbones import coroutine
from mixwright.backbones.coroutine import BACKENDS, AbstractCoroutine, coroutine_type
from mixwright.errors import MissingExtra


@pytest.fixture(params=BACKENDS)
def kind(request: pytest.FixtureRequest) -> type[AbstractCoroutine]:
    return coroutine_type(request.param)


def made(kind: type[AbstractCoroutine], function: Callable[[AbstractCoroutine], Any]) -> AbstractCoroutine:
    """A coroutine of a function that is given its own coroutine."""
    held: list[AbstractCoroutine] = []
    held.append(kind(lambda: function(held[0])))
    return held[0]


def test_values_go_in_and_out(kind: type[AbstractCoroutine]) -> None:
    def function(own: AbstractCoroutine) -> str:
        return f"{own.hand_over('a')}{own.hand_over('b')}"

    one, other = made(kind, function), made(kind, function)
    assert (one.start(), other.start(), one.resume(1), other.resume(3)) == ("a", "a", "b", "b")
    assert not one.done
    assert (other.resume(4), one.resume(2)) == ("34", "12")
    assert one.done
    one.close()


def test_an_error_inside_comes_out(kind: type[AbstractCoroutine]) -> None:
    def function(own: AbstractCoroutine) -> None:
        own.hand_over(None)
        raise KeyError("inside")

    one = made(kind, function)
    one.start()
    with pytest.raises(KeyError, match="inside"):
        one.resume(None)
    assert one.done
    one.close()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_closing_runs_what_is_to_be_run_at_last(kind: type[AbstractCoroutine], steps: int) -> None:
    seen: list[str] = []

    def function(own: AbstractCoroutine) -> None:
        try:
            own.hand_over(None)
            own.hand_over(None)
            seen.append("never")
        except Exception:
            seen.append("an error is not what closing is")
        finally:
            seen.append("last")

    one = made(kind, function)
    if steps:
        one.start()
    for _ in range(steps - 1):
        one.resume(None)
    one.close()
    one.close()
    assert one.done
    assert seen == (["last"] if steps else [])


def test_a_coroutine_within_a_coroutine(kind: type[AbstractCoroutine]) -> None:
    def inner(own: AbstractCoroutine) -> int:
        return own.hand_over(1) + 1

    def outer(own: AbstractCoroutine) -> int:
        within = made(kind, inner)
        return within.resume(own.hand_over(within.start()))

    one = made(kind, outer)
    assert one.start() == 1
    assert one.resume(5) == 6


def test_the_modes_of_torch_are_those_outside(kind: type[AbstractCoroutine]) -> None:
    def modes() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    def function(own: AbstractCoroutine) -> Any:
        own.hand_over(modes())
        own.hand_over(modes())
        return modes()

    one = made(kind, function)
    assert one.start() == (True, False, False)
    with torch.no_grad():
        assert one.resume(None) == (False, False, False)
    assert one.resume(None) == (True, False, False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        one = made(kind, function)
        assert one.start() == (False, True, True)
        assert one.resume(None) == one.resume(None) == (False, True, True)
    assert modes() == (True, False, False)


def test_context_variables_are_seen_inside(kind: type[AbstractCoroutine]) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    def function(own: AbstractCoroutine) -> None:
        own.hand_over(variable.get())
        variable.set(2)

    token = variable.set(1)
    one = made(kind, function)
    assert one.start() == 1
    one.resume(None)
    assert variable.get() == 1
    variable.reset(token)


def test_threads_stand_in_for_greenlets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coroutine_type() is coroutine_type("greenlet")
    monkeypatch.setattr(coroutine, "find_spec", lambda name: None)
    assert coroutine_type() is coroutine_type("thread")
    with pytest.raises(MissingExtra, match=r"mixwright\[manticore\]"):
        coroutine_type("greenlet")
    with pytest.raises(ValueError, match="expected one of greenlet, thread"):
        coroutine_type("process")
