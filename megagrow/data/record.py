"""`prepared.json`: what the data of a family was made from, and whether that is still what the family says.

It is written last, so where it exists the data is complete. Settings must not change once it is there. Raw text must
not change either, but it may be gone, and a file that only has a new time is compared by its checksum. A .bin/.idx
pair that others made is scanned once; `scans.json` remembers the result by size, time and inode.
"""

import contextlib
import dataclasses
import json
import reprlib
from pathlib import Path
from typing import Any

from megagrow import log
from megagrow.config import Family
from megagrow.config.family import STDLIB
from megagrow.config.paths import FamilyPaths
from megagrow.config.user_paths import expand_users
from megagrow.data import files, pair
from megagrow.data.atomic import replacing
from megagrow.data.blend import passes
from megagrow.data.tokenizer import named_file
from megagrow.errors import DataError

RECORD, SCANS = "prepared.json", "scans.json"
VERSION = 2
"""2: padding, truncation and dropout of a tokenizer.json are off; checksums of the input; files by links and types."""
# Bytes of a pair that a training checks itself; more take longer than its ranks should wait.
_SCANNED_IN_TRAINING = 10**11
_PARTS = {"config", "inputs", "sources", "tokenizer", "vocab_size"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The prepared data of a family.

    Attributes:
        directory: directory of all files.
        tokenizer: the tokenizer file; None where all sources were tokenized already and no tokenizer was given.
        prefixes: .bin/.idx pairs without the ending, by source, in the order of the family.
        documents, tokens: number of documents and tokens of each source.
        vocab_size: number of ids of the tokenizer, or of the model where there is no tokenizer.
        taken: what was read of each source of raw text, and what was passed over, in words.
    """

    directory: Path
    tokenizer: Path | None
    prefixes: dict[str, Path]
    documents: dict[str, int]
    tokens: dict[str, int]
    vocab_size: int
    taken: dict[str, str]


def read_prepared(family: Family, *, check_ids: bool = False) -> Prepared:
    """Return the prepared data of a family without reading its raw text, which may have been deleted.

    With `check_ids`, a .bin/.idx pair that was not made here and changed since it was last scanned is scanned again;
    call it on one rank. DataError if the data was not prepared, if a file is missing, if the settings or such a pair
    have changed since, or if a pair has an id outside the vocabulary.
    """
    directory = FamilyPaths(family).data
    if not (directory / RECORD).exists():
        raise DataError(f"{directory}: the data is not prepared: run `megagrow data FAMILY`")
    record = read(directory)
    refuse_changed_settings(directory, record, family)
    refuse_old_encoding(directory, record)
    prepared = from_record(directory, record)
    if lost := first_lost_file(family, prepared):
        raise DataError(f"{lost} is missing or incomplete: run `megagrow data FAMILY` again")
    if check_ids:
        _refuse_long_scan(family, prepared)
        check_pairs(family, prepared, record)
    return prepared


def read(directory: Path) -> dict[str, Any]:
    """Return the content of prepared.json; DataError if it is not one."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{directory / RECORD}: cannot be read: {error}; remove it to prepare again") from None
    if not isinstance(record, dict) or not _PARTS <= set(record):
        raise DataError(
            f"{directory / RECORD}: written by another version of megagrow; remove {directory} to prepare again"
        )
    return {**record, "config": expand_users(record["config"])}


def write(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file of the data directory."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def from_record(directory: Path, record: dict[str, Any]) -> Prepared:
    """Return the prepared data that a record describes."""
    sources = record["sources"]
    return Prepared(
        directory=directory,
        tokenizer=directory / record["tokenizer"] if record["tokenizer"] else None,
        prefixes={name: directory / source["prefix"] for name, source in sources.items()},
        documents={name: source["documents"] for name, source in sources.items()},
        tokens={name: source["tokens"] for name, source in sources.items()},
        vocab_size=record["vocab_size"],
        taken={name: source["taken"] for name, source in sources.items() if source.get("taken")},
    )


def first_lost_file(family: Family, prepared: Prepared) -> Path | None:
    """Return the first file of the prepared data that is missing or, where it was made here, too short; or None."""
    for source in family.data.sources:
        prefix = prepared.prefixes[source.name]
        for ending in pair.ENDINGS:
            if not (file := Path(f"{prefix}{ending}")).is_file():
                return file
        if source.prefix is None and not pair.fits(prefix, prepared.tokens[source.name]):
            return Path(f"{prefix}.bin")
    return prepared.tokenizer if prepared.tokenizer and not prepared.tokenizer.is_file() else None


def prefixes_of(family: Family) -> dict[str, Path] | None:
    """Return the pairs of all sources that exist already, prepared or given; None if one is still to be made."""
    with contextlib.suppress(DataError):
        return read_prepared(family).prefixes
    given = {source.name: source.prefix for source in family.data.sources}
    found = {name: Path(prefix) for name, prefix in given.items() if prefix and Path(f"{prefix}.idx").is_file()}
    return found if len(found) == len(given) else None


def repeated_sources(family: Family, tokens: int) -> list[str]:
    """Return a line for each source that a training on so many tokens reads more than once; DataError for a bad pair.

    Sources whose tokens are not there yet have none.
    """
    lines, data, seq_length = [], family.data, family.stages[0].model.seq_length
    pairs = {name: pair.open_pair(name, prefix, check=False) for name, prefix in (prefixes_of(family) or {}).items()}
    parts = {name: pair.part_of(opened, data.split, "train") for name, opened in pairs.items()}
    per_epoch = {name: max(pair.samples_of(part.tokens, seq_length), 1) for name, part in parts.items()}
    weights = {source.name: source.weight for source in data.sources}
    times = passes(weights, per_epoch, tokens / seq_length) if parts else {}
    for name, number in times.items():
        if number > 1:
            lines.append(
                f"source {name!r} will be read {number:,.1f} times over: its training split has "
                f"{parts[name].tokens:,} tokens, the family trains on {number * parts[name].tokens:,.0f} of it"
            )
    return lines


# Settings


def settings_of(family: Family) -> dict[str, Any]:
    """Return the settings that determine the stream of tokens, as plain JSON."""
    shape = family.stages[0].model
    return {
        "data": family.data.model_dump(mode="json", exclude={"workers"}),
        "tokenizer": family.tokenizer.model_dump(mode="json"),
        "model": {"vocab_size": shape.vocab_size, "seq_length": shape.seq_length},
        "seed": family.seed,
    }


def refuse_changed_settings(directory: Path, record: dict[str, Any], family: Family) -> None:
    """Raise DataError, with both values, if a setting is not the one that the data was made with."""
    if change := _difference(record["config"], settings_of(family), ""):
        place, before, after = change
        raise _changed(directory, place, reprlib.repr(before), reprlib.repr(after))


def refuse_old_encoding(directory: Path, record: dict[str, Any]) -> None:
    """Raise DataError if an older megagrow made the data and obeyed settings that changed what is trained."""
    if record.get("version", 1) >= 2 or record["tokenizer"] != "tokenizer.json":
        return
    try:
        tokenizer = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    model = tokenizer.get("model") or {}
    wrong = [name for name in ("padding", "truncation") if tokenizer.get(name)]
    if wrong := wrong + ["dropout"] * bool(model.get("dropout")):
        raise DataError(
            f"{directory}: an older megagrow made this data and obeyed the {' and '.join(wrong)} saved in its "
            f"tokenizer.json, so it is not the text: remove {directory} or choose another save to start over"
        )


def _changed(directory: Path, what: str, before: str, after: str) -> DataError:
    return DataError(
        f"{what} was {before} when {directory} was prepared and is now {after}: "
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


# Raw text


def inputs_of(family: Family) -> dict[str, dict[str, str]]:
    """Return sizes and times of all files that the data is made from, by source."""
    inputs = {source.name: files.input_state(source) for source in family.data.sources}
    if (file := named_file(family.tokenizer)) is not None:
        if not file.is_file():
            raise DataError(f"tokenizer {file} does not exist: correct tokenizer.tokenizer_model")
        inputs["tokenizer_model"] = {str(file): files.file_state(file)}
    return inputs


def checksums_of(inputs: dict[str, dict[str, str]], family: Family) -> dict[str, str]:
    """Return checksums of all raw files by path; pairs have theirs in `scans.json`."""
    raw = {source.name for source in family.data.sources if source.paths} | {"tokenizer_model"}
    paths = {path for name in raw & set(inputs) for path in inputs[name] if path != STDLIB}
    return {path: files.checksum(Path(path)) for path in sorted(paths)}


def compare_inputs(directory: Path, record: dict[str, Any], family: Family) -> list[str]:
    """Refuse raw text or a tokenizer that changed; return the files that are gone, which is no change.

    The record is updated, here and on disk, where a file has a new time but the same content. Files that were added
    are refused too, unless an older megagrow made the data: it passed over some that are read today.
    """
    gone: list[str] = []
    touched = False
    for source, before in record["inputs"].items():
        if any(given.name == source and given.prefix for given in family.data.sources):
            continue
        for path, state in before.items():
            now = _state_now(path)
            if now is None:
                gone.append(path)
            elif now != state:
                same_size = now.split(",")[0] == state.split(",")[0]
                known = record.get("checksums", {}).get(path)
                if path == STDLIB:
                    log.get("data").warning("%s was %s when the data was prepared and is now %s", path, state, now)
                elif known is not None and same_size and files.checksum(Path(path)) == known:
                    before[path], touched = now, True
                else:
                    raise _changed(directory, f"input {source}.{path}", reprlib.repr(state), reprlib.repr(now))
        if not gone:
            _refuse_added(directory, record, family, source, before)
    if touched:
        write(directory / RECORD, record)
    if gone:
        log.get("data").warning(
            "%d input file(s) are gone, the first is %s: the prepared data is used as it is", len(gone), gone[0]
        )
    return gone


def _state_now(path: str) -> str | None:
    """Return the state of an input as `files.input_state` has it; None if it is gone."""
    if path == STDLIB:
        return files.stdlib_state()
    return files.file_state(Path(path)) if Path(path).is_file() else None


def _refuse_added(directory: Path, record: dict[str, Any], family: Family, source: str, before: dict[str, str]) -> None:
    given = next((one for one in family.data.sources if one.name == source), None)
    if given is None:
        return
    now = files.input_state(given)
    added = [path for path in now if path not in before]
    if added and record.get("version", 1) < VERSION:
        log.get("data").warning(
            "source %r: %d file(s) are not in the prepared data, the first is %s", source, len(added), added[0]
        )
    elif added:
        raise _changed(directory, f"input {source}.{added[0]}", "'absent'", reprlib.repr(now[added[0]]))


# Pairs that others made


def check_pairs(family: Family, prepared: Prepared, record: dict[str, Any] | None) -> dict[str, pair.Scan]:
    """Scan the pairs that were not made here, unless that was done and they are the same files; DataError if bad.

    Args:
        family: the family.
        prepared: its data.
        record: its record; None while the data is being prepared, when a pair may still be any.
    """
    path = prepared.directory / SCANS
    known, scans = _known_scans(path), dict[str, pair.Scan]()
    limit = family.stages[0].model.vocab_size
    for source in family.data.sources:
        if source.prefix is None:
            continue
        prefix = prepared.prefixes[source.name]
        states, note = pair.file_states(prefix), known.get(str(prefix))
        if note is None or note["files"] != states or note["minimum"] < 0 or note["maximum"] >= limit:
            scan = pair.scan_ids(source.name, pair.open_pair(source.name, prefix), limit)
            if pair.file_states(prefix) != states:
                raise DataError(f"source {source.name!r}: {prefix}.bin changed while it was read; run this again")
            if record is not None:
                _refuse_changed_pair(prepared.directory, record, source.name, prefix, note, scan)
            note = {"files": states, **scan._asdict()}
            known[str(prefix)] = note
            write(path, known)
        scans[source.name] = pair.Scan(note["minimum"], note["maximum"], note["checksum"])
    return scans


def _refuse_long_scan(family: Family, prepared: Prepared) -> None:
    """Raise DataError if a scan would keep a training job's ranks waiting for more than some minutes."""
    known = _known_scans(prepared.directory / SCANS)
    for source in family.data.sources:
        prefix = prepared.prefixes[source.name]
        if source.prefix is None or known.get(str(prefix), {}).get("files") == pair.file_states(prefix):
            continue
        if (size := Path(f"{prefix}.bin").stat().st_size) > _SCANNED_IN_TRAINING:
            raise DataError(
                f"source {source.name!r}: {prefix}.bin has {size / 1e9:.0f} GB and changed since its ids were checked: "
                "run `megagrow data FAMILY`, which checks them, before the training"
            )


def _known_scans(path: Path) -> dict[str, Any]:
    """Return the notes of earlier scans; none if there is no such file or it is not one."""
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    wanted = {"files": dict, "minimum": int, "maximum": int, "checksum": str}
    return {
        prefix: note
        for prefix, note in (notes.items() if isinstance(notes, dict) else ())
        if isinstance(note, dict) and all(isinstance(note.get(name), kind) for name, kind in wanted.items())
    }


def _refuse_changed_pair(
    directory: Path, record: dict[str, Any], source: str, prefix: Path, note: dict[str, Any] | None, scan: pair.Scan
) -> None:
    before, now = record.get("pairs", {}).get(source) or (note or {}).get("checksum"), scan.checksum
    if before is None:  # made by an older megagrow: only sizes and times are known
        old = sorted(record["inputs"].get(source, {}).values())
        new = sorted(files.file_state(Path(f"{prefix}{ending}")) for ending in pair.ENDINGS)
        before, now = ", ".join(old), ", ".join(new)
    if before != now:
        raise _changed(directory, f"source {source!r}: {prefix}", reprlib.repr(before), reprlib.repr(now))
