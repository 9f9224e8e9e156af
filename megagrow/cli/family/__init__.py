"""Verbs on a family: plan, run, data, train, report, and those for a cluster."""
