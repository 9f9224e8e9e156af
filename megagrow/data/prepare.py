"""Tokenizes raw text into Megatron's .bin/.idx, once for the whole family.

Everything is stored in `<save>/data`. `prepared.json` is written last: if it exists, the data is complete; if not,
everything is prepared again. It records what the data was made from, and a family whose settings or input no longer
match it is refused: all stages must read the same stream.
"""

import contextlib
import dataclasses
import fcntl
import json
import reprlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megagrow import log
from megagrow.config import DataSource, Family
from megagrow.config.family import TokenizerConfig
from megagrow.config.paths import FamilyPaths
from megagrow.config.user_paths import expand_users
from megagrow.data import text
from megagrow.data.atomic import remove_leftovers, replacing
from megagrow.data.encode import Encoding, encode_documents
from megagrow.data.progress import meter
from megagrow.data.tokenizer import check_vocab, load_tokenizer, named_file, train_sentencepiece
from megagrow.errors import DataError

_RECORD = "prepared.json"
_PARTS = {"config", "inputs", "sources", "tokenizer", "vocab_size"}
_ENDINGS = (".bin", ".idx")
# Number of ids of a given .bin checked against the vocabulary: enough to detect a wrong tokenizer, fast to read.
_IDS_CHECKED = 2**26


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The prepared data of a family.

    Attributes:
        directory: directory of all files.
        tokenizer: the tokenizer file; None where all sources were tokenized already and no tokenizer was given.
        prefixes: .bin/.idx pairs without the ending, by source, in the order of the family.
        documents, tokens: number of documents and tokens of each source.
        vocab_size: number of ids of the tokenizer, or of the model where there is no tokenizer.
    """

    directory: Path
    tokenizer: Path | None
    prefixes: dict[str, Path]
    documents: dict[str, int]
    tokens: dict[str, int]
    vocab_size: int


def prepare(family: Family) -> Prepared:
    """Tokenize the sources of a family into `<save>/data`, or return at once if that has been done.

    May be killed at any moment and run again. DataError where settings or input differ from those that the data was
    made from, and for errors in the corpus, the tokenizer or the disk.
    """
    directory = FamilyPaths(family).data
    config, inputs = _config(family), _inputs(family)
    with _locked(directory):
        if (directory / _RECORD).exists():
            record = _read(directory)
            _refuse_changes(directory, record, {"config": config, "inputs": inputs})
            if not _first_missing_file(done := _prepared(directory, record)):
                return done
        remove_leftovers(directory)
        # Cached sample orders of earlier data have the same names and would be used for the new data.
        shutil.rmtree(directory / "cache", ignore_errors=True)
        record = {"config": config, "inputs": inputs, **_make(family, directory)}
        with replacing(directory / _RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return _prepared(directory, record)


def read_prepared(family: Family) -> Prepared:
    """Return the prepared data of a family without reading its raw text, which may have been deleted.

    DataError if the data was not prepared, if a file is missing, or if the settings have changed since.
    """
    directory = FamilyPaths(family).data
    if not (directory / _RECORD).exists():
        raise DataError(f"{directory}: the data is not prepared: run `megagrow data FAMILY`")
    record = _read(directory)
    _refuse_changes(directory, record, {"config": _config(family)})
    prepared = _prepared(directory, record)
    if missing := _first_missing_file(prepared):
        raise DataError(f"{missing} is missing: run `megagrow data FAMILY` again")
    return prepared


# Inputs


def _config(family: Family) -> dict[str, Any]:
    """Return the settings that determine the stream of tokens, as plain JSON."""
    shape = family.stages[0].model
    return {
        "data": family.data.model_dump(mode="json", exclude={"workers"}),
        "tokenizer": family.tokenizer.model_dump(mode="json"),
        "model": {"vocab_size": shape.vocab_size, "seq_length": shape.seq_length},
        "seed": family.seed,
    }


def _inputs(family: Family) -> dict[str, Any]:
    """Return sizes and times of all files that the data is made from, by source."""
    inputs: dict[str, Any] = {source.name: text.input_state(source) for source in family.data.sources}
    if (file := named_file(family.tokenizer)) is not None:
        if not file.is_file():
            raise DataError(f"tokenizer {file} does not exist: correct tokenizer.tokenizer_model")
        inputs["tokenizer_model"] = {str(file): text.file_state(file)}
    return inputs


def _refuse_changes(directory: Path, record: dict[str, Any], now: dict[str, Any]) -> None:
    for part, value in now.items():
        if change := _difference(record[part], value, ""):
            place, before, after = change
            what = place if part == "config" else f"input {place}"
            raise DataError(
                f"{what} was {reprlib.repr(before)} when {directory} was prepared and is now {reprlib.repr(after)}: "
                f"the data of a family must not change once prepared; restore it, or remove {directory} or "
                "choose another save to start over"
            )


def _difference(before: Any, after: Any, place: str) -> tuple[str, Any, Any] | None:
    """Return the first place where two JSON values differ, with both values, or None."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys: list[Any] = sorted({*before, *after})
        pairs = [(key, before.get(key, "absent"), after.get(key, "absent")) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(before, after, strict=True))]
    else:
        return None if before == after else (place, before, after)
    differences = (_difference(old, new, f"{place}.{key}" if place else key) for key, old, new in pairs)
    return next(filter(None, differences), None)


# Outputs


def _make(family: Family, directory: Path) -> dict[str, Any]:
    """Write the tokenizer and all sources; return their entries for `prepared.json`."""
    sources = family.data.sources
    for source in sources:
        if source.paths and next(text.documents(source), None) is None:
            raise DataError(f"source {source.name!r} is empty: no text in {', '.join(source.paths)}")
    limit = family.stages[0].model.vocab_size
    tokenizer_file, vocab_size = _make_tokenizer(family, directory), limit
    if tokenizer_file is not None:
        tokenizer = load_tokenizer(family.tokenizer, tokenizer_file)
        check_vocab(tokenizer, limit)
        vocab_size = tokenizer.vocab_size
    described: dict[str, Any] = {}
    for source in sources:
        if source.prefix is not None:
            prefix = Path(source.prefix).absolute()
            documents, tokens = _inspect_pair(source.name, prefix, limit)
        else:
            assert tokenizer_file is not None
            prefix = directory / f"{source.name}_text_document"
            encoding = Encoding(family.tokenizer, tokenizer_file, family.data.append_eod)
            documents, tokens = _write_pair(source, prefix, encoding, vocab_size, family.data.workers)
        # Relative for files in our directory, so that a family can be moved.
        where = prefix.name if source.prefix is None else str(prefix)
        described[source.name] = {"prefix": where, "documents": documents, "tokens": tokens}
    return {
        "sources": described,
        "tokenizer": tokenizer_file.name if tokenizer_file else None,
        "vocab_size": vocab_size,
    }


def _make_tokenizer(family: Family, directory: Path) -> Path | None:
    """Copy the configured tokenizer, or train one on the raw text; None where there is neither."""
    config, raw = family.tokenizer, [source for source in family.data.sources if source.paths]
    if config.tokenizer_model is not None:
        return _copy_tokenizer(config, directory)
    if not raw:
        return None
    if tokenized := [source.name for source in family.data.sources if not source.paths]:
        raise DataError(
            f"source {tokenized[0]!r} is tokenized already (prefix), source {raw[0].name!r} is not: "
            "set tokenizer.tokenizer_model to the tokenizer of the first"
        )
    vocab_size = family.stages[0].model.vocab_size
    log.get("data").info("training a SentencePiece model of %d ids on the text", vocab_size)
    texts = (document for source in raw for document in text.documents(source))
    target = directory / "tokenizer.model"
    model = train_sentencepiece(texts, config, vocab_size, family.seed)
    with replacing(target) as temporary:
        temporary.write_bytes(model)
    return target


def _copy_tokenizer(config: TokenizerConfig, directory: Path) -> Path:
    """Copy a tokenizer, and for HuggingFace the settings next to it, under fixed names."""
    source = named_file(config)
    assert source is not None
    load_tokenizer(config)  # loaded here so that an error names the user's file, not our copy
    hugging_face = config.tokenizer_type == "HuggingFace"
    settings = source.with_name("tokenizer_config.json")
    copies = [(source, directory / ("tokenizer.json" if hugging_face else "tokenizer.model"))]
    if hugging_face and settings.is_file():
        copies.append((settings, directory / settings.name))
    for file, target in copies:
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
    return copies[0][1]


def _write_pair(source: DataSource, prefix: Path, encoding: Encoding, vocab_size: int, workers: int) -> tuple[int, int]:
    """Tokenize one source into PREFIX.bin and PREFIX.idx; return its number of documents and tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    bin_path, idx_path = (Path(f"{prefix}{ending}") for ending in _ENDINGS)
    with (
        replacing(bin_path) as bin_temporary,
        replacing(idx_path) as idx_temporary,
        meter(source.name, text.size_on_disk(source)) as counting,
    ):
        builder = IndexedDatasetBuilder(str(bin_temporary), dtype=DType.optimal_dtype(vocab_size))
        try:
            for batch in encode_documents(text.documents(source, counting.read), encoding, workers):
                for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1]) if batch.lengths else []:
                    builder.add_document(ids, [len(ids)])
                counting.wrote(len(batch.lengths), len(batch.ids))
            if not counting.tokens:
                raise DataError(f"source {source.name!r} is empty: its text has no tokens")
            builder.finalize(str(idx_temporary))
        finally:
            builder.data_file.close()
        return counting.documents, counting.tokens


def _inspect_pair(name: str, prefix: Path, vocab_size: int) -> tuple[int, int]:
    """Check an existing .bin/.idx pair; return its number of documents and tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, OSError) as error:
        raise DataError(f"source {name!r}: {prefix}.idx is not an index of tokens: {error}") from None
    lengths = dataset.sequence_lengths
    tokens, size = int(lengths.sum(dtype=np.int64)), Path(f"{prefix}.bin").stat().st_size
    dtype = np.dtype(dataset.index.dtype)
    if not tokens:
        raise DataError(f"source {name!r}: {prefix} is empty")
    if size != tokens * dtype.itemsize:
        raise DataError(
            f"source {name!r}: {prefix}.bin has {size} bytes, its index describes {tokens * dtype.itemsize}: not a pair"
        )
    largest = int(np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")[:_IDS_CHECKED].max())
    if largest >= vocab_size:
        raise DataError(
            f"source {name!r}: {prefix}.bin contains the id {largest}, model.vocab_size is {vocab_size}: "
            "it was made with a larger tokenizer"
        )
    return len(lengths), tokens


# The finished data


def _read(directory: Path) -> dict[str, Any]:
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory / _RECORD}: cannot be read: {error}; remove it to prepare again") from None
    if not isinstance(record, dict) or not _PARTS <= set(record):
        raise DataError(
            f"{directory / _RECORD}: written by another version of megagrow; remove {directory} to prepare again"
        )
    return {**record, "config": expand_users(record["config"])}


def _prepared(directory: Path, record: dict[str, Any]) -> Prepared:
    sources = record["sources"]
    return Prepared(
        directory=directory,
        tokenizer=directory / record["tokenizer"] if record["tokenizer"] else None,
        prefixes={name: directory / source["prefix"] for name, source in sources.items()},
        documents={name: source["documents"] for name, source in sources.items()},
        tokens={name: source["tokens"] for name, source in sources.items()},
        vocab_size=record["vocab_size"],
    )


def _first_missing_file(prepared: Prepared) -> Path | None:
    """Return the first missing file of the prepared data, or None."""
    files = [Path(f"{prefix}{ending}") for prefix in prepared.prefixes.values() for ending in _ENDINGS]
    files += [prepared.tokenizer] if prepared.tokenizer else []
    return next((file for file in files if not file.is_file()), None)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, created if needed: a second process waits, and then finds the work done."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    except OSError as error:
        raise DataError(f"{directory}: cannot be written: {error.strerror}; choose another save directory") from None
    with lock:
        # Some network file systems have no locks; there the user must run one process at a time.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
