"""Find fp8 scaling state: what Transformer Engine saves in a module's `_extra_state` when it trains in fp8.

Without fp8 every `_extra_state` is empty, and there may be hundreds of thousands of them. So their sizes are looked at
first: an archive of nothing is small, and only one of each larger size is opened.
"""

from megagrow.checkpoint.pickles import save_small
from megagrow.checkpoint.reading import ChunkReader

_EMPTY, _EMPTY_STREAM = 1600, 3072
"""Bytes: more than an archive has of None or of an empty tensor, and than one of a stream with None in it."""


def scaling_states(reader: ChunkReader) -> tuple[str, ...]:
    """Return the keys of all `_extra_state` objects that are not empty; CheckpointError if one is damaged or unsafe."""
    sizes: dict[int, bool] = {}
    found = []
    for key, chunk in reader.objects.items():
        if "._extra_state" not in key or chunk.length <= _EMPTY:
            continue
        if chunk.length not in sizes:
            sizes[chunk.length] = _is_state(reader.read_object(key), chunk.length)
        if sizes[chunk.length]:
            found.append(key)
    return tuple(found)


def carried_states(reader: ChunkReader, keys: tuple[str, ...]) -> dict[str, bytes]:
    """Return archives of the given objects, written anew; those that Transformer Engine wrote before 2.0 are left out.

    CheckpointError if one is damaged or unsafe.
    """
    values = {key: reader.read_object(key) for key in keys}
    return {key: save_small(value) for key, value in values.items() if _is_tensor(value)}


def _is_state(value: object, length: int) -> bool:
    """Whether an object holds anything. Before 2.0 Transformer Engine wrote a stream, which is not looked into."""
    (inner,) = value if isinstance(value, list) and len(value) == 1 else (value,)
    if isinstance(inner, str) and inner.startswith("_io.BytesIO"):
        return length > _EMPTY_STREAM
    return inner is not None and getattr(inner, "shape", None) != (0,)


def _is_tensor(value: object) -> bool:
    return isinstance(value, list) and len(value) == 1 and hasattr(value[0], "numel")
