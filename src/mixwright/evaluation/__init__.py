"""Scores and routing statistics."""
