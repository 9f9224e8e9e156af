"""Verbs on a family: plan, run, train, report, and the cluster."""

__all__ = ["commands"]
