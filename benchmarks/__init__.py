"""Measurements: one file for each claim; each writes JSON with the machine and the versions."""
