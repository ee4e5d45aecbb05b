"""What all tests share: no deadline for generated examples on a busy machine, and the same examples every time."""

from hypothesis import settings

settings.register_profile("house", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("house")
