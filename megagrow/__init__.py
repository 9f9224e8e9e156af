"""megagrow: build a family of language models for about the price of its largest member."""

__version__ = "0.1.0"
