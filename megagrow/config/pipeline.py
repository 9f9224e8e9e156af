"""How a pipeline divides the layers among its ranks: evenly, or in one of the three ways in which Megatron does not.

A *chunk* is what a rank holds of one virtual stage. Layers go to the chunks in turn: to the first chunk of every rank,
then to the second of every rank.

Source: Megatron-Core 0.16.1, `transformer/transformer_config.py` (`__post_init__`), `transformer/transformer_block.py`
(`get_num_layers_to_build`) and `transformer/pipeline_parallel_layer_layout.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_LONGEST = 100_000
"""Most characters of a layout, written out."""
_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_REPEATED = re.compile(r"(.)\*(\d+)")
UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""Settings, under Megatron's names, that make a pipeline uneven."""


def layers_of_chunks(layers: int, pipeline: int, virtual: int, uneven: Mapping[str, Any]) -> tuple[range, ...]:
    """Return the layers of each chunk, in the order of the layers: chunk `v` of rank `p` is number v * pipeline + p.

    Args:
        layers: number of the model's layers.
        pipeline, virtual: pipeline ranks, and chunks on each.
        uneven: the settings `UNEVEN`, by name.

    Raises:
        ValueError: the layers cannot be divided so; the message has the numbers.
    """
    if text := uneven.get("pipeline_model_parallel_layout"):
        counts = _counts_of_layout(text, layers)
    else:
        per_rank = _per_rank(layers, pipeline, virtual, uneven)
        for count in per_rank:
            if count % virtual:
                raise ValueError(
                    f"virtual_pipeline_model_parallel_size {virtual} does not divide the {count} layers of a rank"
                )
        counts = [count // virtual for _ in range(virtual) for count in per_rank]
        counts[0] -= bool(uneven.get("account_for_embedding_in_pipeline_split"))
        counts[-1] -= bool(uneven.get("account_for_loss_in_pipeline_split"))
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    return tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))


def stages_of_layout(text: str) -> list[str]:
    """Return the chunks of a `pipeline_model_parallel_layout`, each written out: `Et*2|(t|)*2L` is Ett, t, t and L.

    Raises:
        ValueError: it has characters other than E (embedding), t (layer), L (loss) and | (next chunk), or is too long.
    """
    plain = text.replace(",", "").replace(" ", "")
    for pattern in (_GROUP, _REPEATED):
        if len(plain) + sum(len(part) * int(times[:9]) for part, times in pattern.findall(plain)) > _LONGEST:
            raise ValueError(f"pipeline_model_parallel_layout {text[:40]!r} is longer than {_LONGEST} layers")
        plain = pattern.sub(lambda found: found[1] * int(found[2]), plain)
    if "m" in plain:
        raise ValueError(f"pipeline_model_parallel_layout {text[:40]!r} has m, a layer of multi-token prediction")
    if unknown := sorted(set(plain) - set("EtL|")):
        raise ValueError(
            f"pipeline_model_parallel_layout {text[:40]!r} has {unknown[0]!r}; known are E, t, L, |, * and brackets"
        )
    return plain.split("|")


def check_uneven(pipeline: int, virtual: int | None, uneven: Mapping[str, Any]) -> None:
    """Raise ValueError if settings contradict each other or the size of the pipeline."""
    found = [name for name in UNEVEN if uneven.get(name)]
    if found and pipeline == 1:
        raise ValueError(f"{found[0]} needs pipeline_model_parallel_size above 1")
    kinds = {name.split("_")[0] for name in found}
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(found)} exclude each other: a pipeline is divided in one way")
    if text := uneven.get("pipeline_model_parallel_layout"):
        stages = stages_of_layout(text)
        if len(stages) != pipeline * (virtual or 1):
            raise ValueError(
                f"pipeline_model_parallel_layout {text[:40]!r} has {len(stages)} chunks; "
                f"pipeline_model_parallel_size {pipeline} x virtual_pipeline_model_parallel_size {virtual or 1} "
                f"is {pipeline * (virtual or 1)}"
            )
        plain = "".join(stages)
        if plain.count("E") != 1 or plain.count("L") != 1 or plain[0] != "E" or plain[-1] != "L":
            raise ValueError(
                f"pipeline_model_parallel_layout {text[:40]!r} must begin with its only E and end with its only L"
            )


def _counts_of_layout(text: str, layers: int) -> list[int]:
    counts = [stage.count("t") for stage in stages_of_layout(text)]
    if sum(counts) != layers:
        raise ValueError(
            f"pipeline_model_parallel_layout {text[:40]!r} has {sum(counts)} layers, num_layers is {layers}"
        )
    return counts


def _per_rank(layers: int, pipeline: int, virtual: int, uneven: Mapping[str, Any]) -> Sequence[int]:
    """Layers of each rank, in which embedding and loss count as layers where they are accounted for."""
    first = uneven.get("decoder_first_pipeline_num_layers")
    last = uneven.get("decoder_last_pipeline_num_layers")
    if first is None and last is None:
        extra = sum(bool(uneven.get(f"account_for_{name}_in_pipeline_split")) for name in ("embedding", "loss"))
        total, chunks = layers + extra, pipeline * virtual
        if total % chunks:
            counted = f"num_layers {layers}" + (f" + {extra} for embedding and loss" if extra else "")
            raise ValueError(
                f"pipeline_model_parallel_size {pipeline} x virtual_pipeline_model_parallel_size {virtual} = {chunks} "
                f"does not divide {counted}"
            )
        return [total // pipeline] * pipeline
    ends = [count for count in (first, last) if count is not None]
    rest, ranks = layers - sum(ends), pipeline - len(ends)
    if rest < 0 or bool(rest) != bool(ranks) or (ranks and rest % ranks):
        raise ValueError(
            f"decoder_first_pipeline_num_layers {first} and decoder_last_pipeline_num_layers {last} leave {rest} of "
            f"num_layers {layers} for {ranks} pipeline ranks, which cannot share them evenly"
        )
    middle = [rest // ranks] * ranks if ranks else []
    return [*([] if first is None else [first]), *middle, *([] if last is None else [last])]
