"""What holds for every test: nothing is compiled behind a test's back."""

import os

os.environ.setdefault("MIXWRIGHT_KERNELS", "off")
