"""All randomness of a run comes from its seed: every forward pass starts from a state computed from (seed, pass)."""

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


def seed_pass(seed: int, index: int) -> None:
    """Set the random states of torch (every device), numpy and Python for forward pass `index` of a run.

    Passes are numbered over all processes, so dropout does not depend on how passes are spread over processes, and a
    resumed run needs no stored state.
    """
    mixed = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


@contextmanager
def own_randomness() -> Generator[None]:
    """Inside the block the global random states may be set at will; afterwards they are the caller's again."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
