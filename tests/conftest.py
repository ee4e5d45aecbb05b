"""What all tests share: no deadline for generated examples on a busy machine, the same examples every time, and nothing
compiled behind a test's back."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("MIXWRIGHT_KERNELS", "off")
settings.register_profile("house", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("house")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The compiled functions, built once for all workers; whoever asks for them is skipped without a C compiler."""
    from mixwright.ops import kernels

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    try:
        return kernels.load("auto", folder)
    except kernels.KernelUnavailable as reason:
        pytest.skip(str(reason))
