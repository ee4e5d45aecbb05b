"""What all tests share: no deadline for generated examples on a busy machine, the same examples every time, and nothing
compiled behind a test's back."""

import os

from hypothesis import settings

os.environ.setdefault("MIXWRIGHT_KERNELS", "off")
settings.register_profile("house", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("house")
