"""Experts at rest: PEFT folders with cards."""
