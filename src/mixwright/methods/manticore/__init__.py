"""Manticore: hybrids of pretrained language models of different architectures."""

from mixwright.methods.manticore.config import METHOD, ManticoreConfig

__all__ = ["METHOD", "ManticoreConfig"]
