"""Experts: parameterisations of E members at one site, stacked on a leading expert axis."""
