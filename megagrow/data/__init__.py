"""From text to samples: one corpus, one tokenizer and one endless stream of samples for the whole family.

`prepare` tokenizes the sources of a family into Megatron's .bin/.idx once; `read_prepared` returns the result. The
stream itself is in `megagrow.data.stream`, imported only for training and evaluation: it needs megatron-core, which
takes seconds to import. Nothing imported here needs it.
"""

from megagrow.data.prepare import prepare
from megagrow.data.record import Prepared, read_prepared
from megagrow.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Prepared", "Tokenizer", "load_tokenizer", "prepare", "read_prepared"]
