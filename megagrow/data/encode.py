"""Documents to ids, over several processes, in the order in which they came.

The reader hands out batches of documents, workers turn them into ids, and results are taken in the order of the
batches; no more than a few batches a worker are under way, so memory does not grow with the corpus. A worker
imports nothing but the tokenizer, and leaves when the process that started it is gone.
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
from megagrow.data.tokenizer import load_tokenizer
from megagrow.errors import DataError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Encoding:
    """How text becomes ids: the tokenizer in `path`, and whether each document ends with its eod."""

    config: TokenizerConfig
    path: Path
    append_eod: bool


class EncodedBatch(NamedTuple):
    """Ids of some documents, int32 [sum of lengths], and the length of each document."""

    ids: np.ndarray
    lengths: list[int]


def encode_documents(texts: Iterable[str], encoding: Encoding, workers: int) -> Iterator[EncodedBatch]:
    """Yield the ids of all documents in their order, in batches; documents without a token are left out.

    `workers` 1 works in this process, 0 takes a process for each core that this one may use. DataError if one dies.
    """
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        encode = _encoder(encoding)
        yield from (encode(batch) for batch in _batches(texts))
        return
    # spawn: this process may already hold torch and its threads, which a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent) as pool:
        under_way: deque[Future[EncodedBatch]] = deque()
        try:
            for batch in _batches(texts):
                under_way.append(pool.submit(_encode_in_worker, encoding, batch))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise DataError(f"a tokenizer process died (out of memory?): lower data.workers below {workers}") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _encoder(encoding: Encoding) -> Callable[[list[str]], EncodedBatch]:
    """Load the tokenizer and return what turns a batch of documents into ids."""
    tokenizer = load_tokenizer(encoding.config, encoding.path)
    end = [tokenizer.eod] if encoding.append_eod else []

    def encode(texts: list[str]) -> EncodedBatch:
        documents = [ids + end for text in texts if (ids := tokenizer.encode(text))]
        flat = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32)
        return EncodedBatch(flat, [len(ids) for ids in documents])

    return encode


# A worker has one encoding for all its life; this process must not keep one, because its file may change.
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
    """End this worker when its parent is killed; it would else wait for work for ever."""
    # tokenizers' own threads would compete with the other workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
