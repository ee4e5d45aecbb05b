"""Routers: who acts, and how strongly."""
