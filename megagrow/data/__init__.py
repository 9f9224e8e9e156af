"""Text to batches: one corpus, one tokenizer and one endless stream of samples for the whole family.

`prepare` turns the sources of a family into Megatron's .bin/.idx once; `read_prepared` finds them again. The
stream itself is `megagrow.data.stream`, imported only by those who train or evaluate: it needs megatron-core,
whose import takes seconds, and nothing here does.
"""

from megagrow.data.prepare import Prepared, prepare, read_prepared
from megagrow.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Prepared", "Tokenizer", "load_tokenizer", "prepare", "read_prepared"]
