"""Triton twins of what `ops` does on a GPU; see `ops/gpu.py`. Importing this needs the extra `gpu`."""

from mixwright.errors import MissingExtra

try:
    import triton as triton
except ImportError as error:
    raise MissingExtra("gpu", "the Triton kernels of product keys and single-neuron experts") from error
