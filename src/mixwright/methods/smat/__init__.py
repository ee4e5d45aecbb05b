"""Sparse interpolated experts, meta-tuned: few-shot work out of distribution."""

from mixwright.methods.smat.config import METHOD, SmatConfig

__all__ = ["METHOD", "SmatConfig"]
