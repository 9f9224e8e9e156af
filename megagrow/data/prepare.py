"""Tokenizes raw text into Megatron's .bin/.idx, once for the whole family.

Everything is stored in `<save>/data`. `prepared.json` is written last: if it exists, the data is complete; if not,
everything is prepared again. `megagrow.data.record` compares it with the family: all stages must read the same stream.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megagrow import log
from megagrow.config import DataSource, Family
from megagrow.config.family import TokenizerConfig
from megagrow.config.paths import FamilyPaths
from megagrow.data import pair, record, text
from megagrow.data.atomic import remove_leftovers, replacing
from megagrow.data.encode import Encoding, encode_documents
from megagrow.data.files import Listing, list_files
from megagrow.data.huggingface import SETTINGS_FILES
from megagrow.data.progress import meter
from megagrow.data.record import Prepared
from megagrow.data.sentencepiece_model import train_sentencepiece
from megagrow.data.tokenizer import check_vocab, describe, load_tokenizer, named_file
from megagrow.errors import DataError

# A larger share of unknown tokens means that the tokenizer is for other text. Half is all: a blank, then one unknown
# token for the word, as SentencePiece does.
_MOST_UNKNOWN = 0.25
_WORTH_A_WARNING = 0.001


def prepare(family: Family) -> Prepared:
    """Tokenize the sources of a family into `<save>/data`, or return at once if that has been done.

    May be killed at any moment and run again. DataError where settings or input differ from those that the data was
    made from, where a split has no sample, and for errors in the corpus, the tokenizer or the disk. Raw text that is
    gone is no error once it is prepared.
    """
    directory = FamilyPaths(family).data
    with _locked(directory):
        if (directory / record.RECORD).exists():
            known = record.read(directory)
            record.refuse_changed_settings(directory, known, family)
            record.refuse_old_encoding(directory, known)
            gone = record.compare_inputs(directory, known, family)
            done = record.from_record(directory, known)
            lost = record.first_lost_file(family, done)
            if not lost:
                record.check_pairs(family, done, known)
                _check_splits(family, done)
                return done
            if gone:
                raise DataError(
                    f"{lost} is missing or incomplete and cannot be made again, because its text is gone: {gone[0]}"
                )
        return _prepare_anew(family, directory)


def _prepare_anew(family: Family, directory: Path) -> Prepared:
    inputs = record.inputs_of(family)
    remove_leftovers(directory)
    # Cached sample orders of earlier data have the same names and would be used for the new data.
    shutil.rmtree(directory / "cache", ignore_errors=True)
    made = {"version": record.VERSION, "config": record.settings_of(family), "inputs": inputs}
    made |= _make(family, directory)
    prepared = record.from_record(directory, made)
    scans = record.check_pairs(family, prepared, None)
    _check_splits(family, prepared)
    made["pairs"] = {name: scan.checksum for name, scan in scans.items()}
    made["checksums"] = record.checksums_of(inputs, family)
    if record.inputs_of(family) != inputs:
        raise DataError(f"a file of the corpus changed while {directory} was prepared from it: run this again")
    record.write(directory / record.RECORD, made)
    return prepared


def _check_splits(family: Family, prepared: Prepared) -> None:
    """Raise DataError if training or validation has no sample: here, not after the job has waited for its GPUs."""
    pairs = {name: pair.open_pair(name, prefix) for name, prefix in prepared.prefixes.items()}
    for part, check in (("train", pair.check_train), ("valid", pair.check_valid)):
        check(family, {name: pair.part_of(opened, family.data.split, part) for name, opened in pairs.items()})


# Making


@dataclass
class _Taken:
    """What one source of raw text gave."""

    listing: Listing
    counts: text.Counts = field(default_factory=text.Counts)
    text_tokens: int = 0
    without_ids: int = 0
    unknown: int = 0
    lost_marks: int = 0

    def describe(self) -> str:
        """What was taken and what was passed over, in words."""
        taken = f"{len(self.listing.files):,} files, {self.counts.documents:,} documents"
        passed = [
            f"{number:,} {reason} ({self.listing.examples[reason]})"
            for reason, number in self.listing.passed_over.most_common()
        ]
        for number, what in (
            (self.counts.empty, "empty documents"),
            (self.counts.not_utf8, "files that are not UTF-8"),
            (self.without_ids, "documents that gave no token"),
        ):
            passed += [f"{number:,} {what}"] * bool(number)
        lost = [f"{self.unknown:,} unknown tokens"] * bool(self.unknown)
        lost += [f"{self.lost_marks:,} characters U+2581, which became blanks"] * bool(self.lost_marks)
        parts = (("took", [taken]), ("passed over", passed), ("lost", lost))
        return "; ".join(f"{verb} {', '.join(what)}" for verb, what in parts if what)

    def judge(self, source: str) -> None:
        """Refuse a source that is mostly unknown to its tokenizer; warn of what text loses."""
        if not self.text_tokens:
            raise DataError(f"source {source!r} is empty: its text has no tokens")
        share, of = self.unknown / self.text_tokens, f"{self.unknown:,} of {self.text_tokens:,} tokens"
        if share > _MOST_UNKNOWN:
            raise DataError(
                f"source {source!r}: {of} are unknown to the tokenizer: "
                "it was made for other text; set tokenizer.tokenizer_model to another, or unset it to train one"
            )
        if share > _WORTH_A_WARNING:
            log.get("data").warning("source %r: %s are unknown to the tokenizer", source, of)
        if self.lost_marks:
            log.get("data").warning(
                "source %r: its %s characters U+2581 become blanks, because the tokenizer writes a blank as U+2581",
                source, f"{self.lost_marks:,}",
            )  # fmt: skip


def _make(family: Family, directory: Path) -> dict[str, Any]:
    """Write the tokenizer and all sources; return their entries for `prepared.json`."""
    sources = family.data.sources
    listings = {source.name: list_files(source) for source in sources if source.paths}
    for source in sources:
        if source.paths and next(text.documents(source, files=listings[source.name].files), None) is None:
            raise DataError(f"source {source.name!r} is empty: no text in {', '.join(source.paths)}")
    limit = family.stages[0].model.vocab_size
    tokenizer_file, vocab_size = _make_tokenizer(family, directory), limit
    if tokenizer_file is not None:
        tokenizer = load_tokenizer(family.tokenizer, tokenizer_file)
        check_vocab(tokenizer, limit)
        vocab_size = tokenizer.vocab_size
        for note in describe(tokenizer) if family.tokenizer.tokenizer_model else ():
            log.get("data").warning("tokenizer %s: %s", family.tokenizer.tokenizer_model, note)
    described: dict[str, Any] = {}
    for source in sources:
        if source.prefix is not None:
            prefix, taken = Path(source.prefix).absolute(), None
            opened = pair.open_pair(source.name, prefix)
            documents, tokens = len(opened.lengths), opened.tokens
        else:
            assert tokenizer_file is not None
            prefix, taken = directory / f"{source.name}_text_document", _Taken(listings[source.name])
            encoding = Encoding(family.tokenizer, tokenizer_file, family.data.append_eod)
            documents, tokens = _write_pair(source, prefix, encoding, vocab_size, family.data.workers, taken)
        # Relative for files in our directory, so that a family can be moved.
        where = prefix.name if source.prefix is None else str(prefix)
        described[source.name] = {"prefix": where, "documents": documents, "tokens": tokens}
        described[source.name] |= {"taken": taken.describe()} if taken else {}
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
    copies = [(source, directory / ("tokenizer.json" if hugging_face else "tokenizer.model"))]
    for name in SETTINGS_FILES if hugging_face else ():
        if (settings := source.with_name(name)).is_file():
            copies.append((settings, directory / name))
        else:
            (directory / name).unlink(missing_ok=True)  # of an earlier, unfinished preparation
    for file, target in copies:
        with replacing(target) as temporary:
            shutil.copyfile(file, temporary)
    return copies[0][1]


def _write_pair(
    source: DataSource, prefix: Path, encoding: Encoding, vocab_size: int, workers: int, taken: _Taken
) -> tuple[int, int]:
    """Tokenize one source into PREFIX.bin and PREFIX.idx; return its number of documents and tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    bin_path, idx_path = (Path(f"{prefix}{ending}") for ending in pair.ENDINGS)
    files = taken.listing.files
    with (
        replacing(bin_path) as bin_temporary,
        replacing(idx_path) as idx_temporary,
        meter(source.name, text.size_on_disk(files)) as counting,
    ):
        builder = IndexedDatasetBuilder(str(bin_temporary), dtype=DType.optimal_dtype(vocab_size))
        try:
            documents = text.documents(source, counting.read, taken.counts, files)
            for batch in encode_documents(documents, encoding, workers):
                for ids in np.split(batch.ids, np.cumsum(batch.lengths)[:-1]) if batch.lengths else []:
                    builder.add_document(ids, [len(ids)])
                counting.wrote(len(batch.lengths), len(batch.ids))
                taken.text_tokens += len(batch.ids) - encoding.append_eod * len(batch.lengths)
                taken.without_ids += batch.without_ids
                taken.unknown += batch.unknown
                taken.lost_marks += batch.lost_marks
            taken.judge(source.name)
            builder.finalize(str(idx_temporary))
        finally:
            builder.data_file.close()
        return counting.documents, counting.tokens


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
