"""Verbs on checkpoints: convert, verify, inspect, diff; and the list of growth operators."""

__all__ = ["commands", "operators"]
