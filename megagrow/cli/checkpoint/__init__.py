"""Verbs on checkpoints: convert, verify, inspect and diff; also operators, the list of growth operators."""
