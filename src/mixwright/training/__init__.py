"""Stages and the one training loop."""
