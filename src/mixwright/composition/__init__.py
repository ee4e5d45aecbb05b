"""Experts at work: mixtures at sites of a frozen backbone."""
