"""PHATGOOSE: post-hoc gates route every token, at every layer, among LoRA experts trained apart."""

from mixwright.methods.phatgoose.config import METHOD, PhatgooseConfig

__all__ = ["METHOD", "PhatgooseConfig"]
