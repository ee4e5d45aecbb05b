"""Experts on one backbone, composed into one model."""
