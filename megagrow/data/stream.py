"""The token stream of a family: endless, and the same whatever is trained on it.

A source is a sequence of epochs, each of them every document once, in an order drawn from seed + epoch; so sample i
of a source never depends on how much will be trained (Megatron's own multi-epoch shuffle does). A blend merges the
sources sample by sample. What a family has consumed is therefore a handful of numbers, a `Position`, and the next
stage goes on from it with any batch size and any layout. Nothing here talks to other ranks: each reads what it needs.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megagrow import log
from megagrow.config import Family
from megagrow.data.atomic import replacing
from megagrow.data.blend import BlendedSamples, blend
from megagrow.data.prepare import Prepared
from megagrow.errors import DataError

Sample = dict[str, torch.Tensor]

# Choices of the blend that are worked out at a time.
_BLOCK = 4096
_KEPT = 2
_VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Position:
    """Samples consumed of each source, by its name, since the family began; a source that is not named: none."""

    consumed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Samples consumed of all sources together."""
        return sum(self.consumed.values())

    def to_dict(self) -> dict[str, int]:
        """Return plain values for a checkpoint or JSON."""
        return dict(self.consumed)

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> "Position":
        """Return the position that `to_dict` gave; DataError if the values are no counts."""
        for name, count in values.items():
            if not isinstance(count, int) or count < 0:
                raise DataError(f"position of source {name!r} is {count!r}, not a number of samples")
        return cls(dict(values))


class TrainStream:
    """The training samples of a family from a position on; rank and batch do not matter."""

    def __init__(self, prepared: Prepared, family: Family, start: Position | None = None) -> None:
        start = start or Position()
        self.names = tuple(prepared.prefixes)
        if unknown := sorted(set(start.consumed) - set(self.names)):
            raise DataError(f"position names the source {unknown[0]!r}; the family has {', '.join(self.names)}")
        self._sources = [_SourceSamples(name, prepared, family, Split.train, family.seed) for name in self.names]
        for source in self._sources:
            source.check_has_sample()
        self._weights = _weights(family)
        # Counts at the beginning of each block known so far: any block can be made again from them.
        self._counts = [np.array([start.consumed.get(name, 0) for name in self.names], dtype=np.int64)]
        self._block = functools.lru_cache(maxsize=_KEPT)(self._make_block)

    def sample(self, i: int) -> Sample:
        """Return the i-th sample after the start, i from 0.

        tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length], all ones. Not collective:
        ranks may ask for whatever they need, whenever they need it.
        """
        choice = self._block_at(i // _BLOCK)
        return self._sources[choice.source[i % _BLOCK]].sample(int(choice.index[i % _BLOCK]))

    def position_after(self, n: int) -> Position:
        """Return the position after the first n samples after the start."""
        choice = self._block_at(n // _BLOCK)
        counts = self._counts[n // _BLOCK] + self._in_each(choice.source[: n % _BLOCK])
        return Position({name: int(count) for name, count in zip(self.names, counts, strict=True)})

    def _block_at(self, block: int) -> BlendedSamples:
        """Return a block of choices; those before it are worked out where they are not known yet."""
        if block < 0:
            raise IndexError("samples are numbered from 0")
        while len(self._counts) <= block:
            self._counts.append(self._counts[-1] + self._in_each(self._block(len(self._counts) - 1).source))
        return self._block(block)

    def _make_block(self, block: int) -> BlendedSamples:
        return blend(self._weights, self._counts[block], _BLOCK)

    def _in_each(self, source: np.ndarray) -> np.ndarray:
        return np.bincount(source, minlength=len(self.names))


class ValidationSamples(Sequence[Sample]):
    """The first samples of the validation split, always the same, whatever the seed of the family."""

    def __init__(self, sources: Sequence["_SourceSamples"], choice: BlendedSamples) -> None:
        self._sources, self._choice = sources, choice

    def __len__(self) -> int:
        return len(self._choice.source)

    def __getitem__(self, i: Any) -> Any:
        """Return sample i as `TrainStream.sample` does."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._sources[self._choice.source[i]].sample(int(self._choice.index[i]))


def validation_samples(prepared: Prepared, family: Family) -> ValidationSamples:
    """Return the first `evaluation.eval_samples` samples of the validation split, the weights honored.

    Where the split holds fewer, all it has (which is logged once); DataError if it holds none.
    """
    sources = [_SourceSamples(name, prepared, family, Split.valid, _VALIDATION_SEED) for name in prepared.prefixes]
    wanted, sizes = family.evaluation.eval_samples, np.array([source.samples for source in sources])
    if not sizes.sum():
        raise DataError(
            f"the validation split has no sample: {'; '.join(source.describe() for source in sources)}; "
            "enlarge it in data.split or cut the text into more documents (a text file is one, as is a JSONL line)"
        )
    if sizes.sum() < wanted:
        log.get("data").warning(
            "evaluation.eval_samples is %d, the validation split holds %d: all of them are used", wanted, sizes.sum()
        )
    return ValidationSamples(sources, blend(_weights(family), np.zeros_like(sizes), wanted, sizes))


def _weights(family: Family) -> np.ndarray:
    return np.array([source.weight for source in family.data.sources], dtype=np.float64)


class _SourceSamples:
    """One source of one split: an endless sequence of samples, epoch after epoch."""

    def __init__(self, name: str, prepared: Prepared, family: Family, split: Split, seed: int) -> None:
        self.name, self.split, self.seed = name, split, seed
        self.prefix, self.vocab_size = str(prepared.prefixes[name]), prepared.vocab_size
        self.cache, self.split_ratio = prepared.directory / "cache", family.data.split
        self.seq_length = family.stages[0].model.seq_length
        self._tokens = GPTDataset.build_low_level_dataset(self.prefix, self._config(epoch=0))
        self._documents = self._documents_of_split()
        self.tokens = int(self._tokens.sequence_lengths[self._documents].sum(dtype=np.int64))
        # Labels are the tokens one further, so the last sample needs one token more.
        self.samples = max(self.tokens - 1, 0) // self.seq_length
        self._open_epochs: collections.OrderedDict[int, _ShuffledEpoch] = collections.OrderedDict()

    def sample(self, i: int) -> Sample:
        """Sample i of this source, i from 0 without end."""
        epoch, index = divmod(i, self.samples)
        sample = self._epoch(epoch)[index]
        # Megatron gives every caller the same two tensors; one that changes its own must not change the next.
        return sample | {key: sample[key].clone() for key in ("loss_mask", "position_ids")}

    def check_has_sample(self) -> None:
        """Raise DataError, with the numbers, where the split is shorter than one sample."""
        if not self.samples:
            raise DataError(
                f"too few tokens for one sample of seq_length {self.seq_length} + 1: {self.describe()}; "
                "give more text or a smaller seq_length"
            )

    def describe(self) -> str:
        """What the split holds, for an error."""
        have = f"{len(self._documents)} of {len(self._tokens)} documents, {self.tokens} tokens"
        return f"source {self.name!r} has {have} in the {self.split.name} part of split {self.split_ratio}"

    def _epoch(self, epoch: int) -> "_ShuffledEpoch":
        if epoch not in self._open_epochs:
            config = self._config(epoch)
            self._open_epochs[epoch] = _ShuffledEpoch(self._tokens, self.prefix, self._documents, None, self.split, config)
            if len(self._open_epochs) > _KEPT:
                self._open_epochs.popitem(last=False)
        self._open_epochs.move_to_end(epoch)
        return self._open_epochs[epoch]

    def _config(self, epoch: int) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=(self.seed + epoch) % 2**32,
            sequence_length=self.seq_length,
            blend=([self.prefix], None),
            split=self.split_ratio,
            path_to_cache=str(self.cache),
            tokenizer=_NoTokenizer(self.vocab_size),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )

    def _documents_of_split(self) -> np.ndarray:
        """Documents of the split, cut where BlendedMegatronDatasetBuilder would cut; int32 [documents]."""
        part = self._config(epoch=0).split_matrix[self.split.value]
        begin, end = (round(edge * len(self._tokens)) for edge in part or (0, 0))
        return np.arange(begin, end, dtype=np.int32)


class _ShuffledEpoch(GPTDataset):
    """One pass over the documents, shuffled.

    Only the order of samples is our own. Megatron lets rank 0 build and save it while the others wait at a barrier,
    so a rank could not begin an epoch by itself, and a kill could leave half a cache file that later runs trust.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document [documents], sample [samples + 1, 2] and shuffle [samples] indices, from the cache or new."""
        stem = f"{self.unique_description_hash}-{self.index_split.name}-{self.config.random_seed}"
        paths = [Path(self.config.path_to_cache) / f"{stem}-{kind}.npy" for kind in ("document", "sample", "shuffle")]
        if not all(path.exists() for path in paths):
            for path, array in zip(paths, self._draw(), strict=True):
                with replacing(path) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, array)
        document, sample, shuffle = (np.load(path, mmap_mode="r") for path in paths)
        return document, sample, shuffle

    def _draw(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.RandomState(self.config.random_seed)
        document = rng.permutation(self.indices)
        lengths = self.dataset.sequence_lengths
        tokens = int(lengths[self.indices].sum(dtype=np.int64))
        sample = helpers.build_sample_idx(lengths, document, self.config.sequence_length, 1, tokens)
        shuffle = rng.permutation(len(sample) - 1).astype(np.uint32)
        return document, sample, shuffle


class _NoTokenizer:
    """All that GPTDataset asks of a tokenizer once text is ids.

    There is no `pad`, so Megatron takes -1, which is no token: no real token is masked or turned into 0.
    """

    eod = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"vocab_size": vocab_size}
