"""Encodes documents as ids in several processes, keeping their order.

The reader distributes batches of documents, workers encode them, and results are taken in the order of the batches. No
more than a few batches per worker are pending, so memory does not grow with the corpus. A worker imports only the
tokenizer, and exits when its parent process dies.
"""

import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megagrow.config.family import TokenizerConfig
from megagrow.data.tokenizer import BLANK, load_tokenizer, loses_blank_mark
from megagrow.errors import DataError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Encoding:
    """How to encode text: with the tokenizer in `path`, and whether to append its eod to each document."""

    config: TokenizerConfig
    path: Path
    append_eod: bool


class EncodedBatch(NamedTuple):
    """A batch of documents, encoded.

    Attributes:
        ids: int32 [sum of lengths].
        lengths: number of ids of each document, its eod included.
        without_ids: documents that gave no id and are left out.
        unknown: ids of text that is not in the vocabulary.
        lost_marks: characters U+2581 that became blanks.
    """

    ids: np.ndarray
    lengths: list[int]
    without_ids: int
    unknown: int
    lost_marks: int


def encode_documents(texts: Iterable[str], encoding: Encoding, workers: int) -> Iterator[EncodedBatch]:
    """Yield the ids of all documents in order, in batches; documents without a token are left out.

    With `workers` 1 this process encodes, with 0 one process per available core. DataError if a worker dies.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        encode = _encoder(encoding)
        yield from (encode(batch) for batch in _batches(texts))
        return
    # spawn: this process may have loaded torch, whose threads a fork would copy in an undefined state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent) as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in _batches(texts):
                pending.append(pool.submit(_encode_in_worker, encoding, batch))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError(f"a tokenizer process died (out of memory?): lower data.workers below {workers}") from None
        finally:
            # Waits for the batches in work: the pool's thread, if it ended together with this process, would print a
            # traceback below the error.
            pool.shutdown(cancel_futures=True)


def _encoder(encoding: Encoding) -> Callable[[list[str]], EncodedBatch]:
    """Load the tokenizer and return a function that encodes a batch of documents."""
    tokenizer = load_tokenizer(encoding.config, encoding.path)
    end = [tokenizer.eod] if encoding.append_eod else []
    unknown, loses_marks = tokenizer.unknown, loses_blank_mark(tokenizer)

    def encode(texts: list[str]) -> EncodedBatch:
        documents = [ids + end for text in texts if (ids := tokenizer.encode(text))]
        flat = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32)
        return EncodedBatch(
            flat,
            [len(ids) for ids in documents],
            without_ids=len(texts) - len(documents),
            unknown=0 if unknown is None else int(np.count_nonzero(flat == unknown)),
            lost_marks=sum(text.count(BLANK) for text in texts) if loses_marks else 0,
        )

    return encode


# A worker uses one encoding all its life. The parent must not cache it, because the tokenizer file may change.
_encoder_of_worker = functools.lru_cache(maxsize=1)(_encoder)


def _encode_in_worker(encoding: Encoding, texts: list[str]) -> EncodedBatch:
    return _encoder_of_worker(encoding)(texts)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _exit_with_parent() -> None:
    """Exit when the parent is killed; otherwise this worker would wait for work forever."""
    # The tokenizer's own threads would compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
