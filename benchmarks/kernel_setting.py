"""The compiled kernels switched on or off for a while, so that both sides are measured in one run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mixwright.ops import kernels


@contextmanager
def kernels_set(value: str) -> Iterator[None]:
    """Inside the block the environment asks for `value` of the kernels, such as `off`."""
    before = os.environ.get(kernels.SETTING)
    os.environ[kernels.SETTING] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[kernels.SETTING]
        else:
            os.environ[kernels.SETTING] = before
