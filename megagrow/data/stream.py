"""The endless token stream of a family, the same for every stage, batch size and layout.

A source is a sequence of epochs. Each epoch contains every document once, in an order drawn from seed + epoch, so
sample i of a source does not depend on how long training will be (in Megatron's own multi-epoch shuffle it does). A
blend merges the sources sample by sample. What a family has consumed is therefore one count per source, a `Position`,
and the next stage continues from it with any batch size and layout. Ranks do not communicate here: each reads the
samples it needs.
"""

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megagrow.config import Family
from megagrow.data import pair
from megagrow.data.atomic import replacing
from megagrow.data.blend import BlendedSamples, blend
from megagrow.data.record import Prepared
from megagrow.errors import DataError

Sample = dict[str, torch.Tensor]
"""tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length], all ones."""

# Number of samples for which the blend is computed at a time.
_BLOCK = 4096
# Number of blocks of the blend, and of epochs of a source, kept in memory.
_KEPT = 2
_VALIDATION_SEED = 0
# The cache files of an older megagrow, which no version reads any more.
_OLD_CACHE = re.compile(r"[0-9a-f]{32}-(train|valid|test)-\d+-(document|sample|shuffle)\.npy")


@dataclasses.dataclass(frozen=True)
class Position:
    """Samples consumed from each source, by name, since the family's first step; 0 for a source that is missing."""

    consumed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Samples consumed from all sources together."""
        return sum(self.consumed.values())

    def to_dict(self) -> dict[str, int]:
        """Return plain values for a checkpoint or JSON."""
        return dict(self.consumed)

    @classmethod
    def from_dict(cls, values: Mapping[str, int]) -> "Position":
        """Read a position from the values of `to_dict`; DataError if they are not counts."""
        for name, count in values.items():
            if not isinstance(count, int) or count < 0:
                raise DataError(f"position of source {name!r} is {count!r}, not a number of samples")
        return cls(dict(values))


class TrainStream:
    """The training samples of a stage from a position on, the same for every rank and batch size.

    Stages whose samples have one length read one stream. Another length cuts and shuffles an epoch anew: it goes on at
    the same share of the epoch, so that all tokens are counted, but some of that epoch are
    read again and others left out.
    """

    def __init__(self, prepared: Prepared, family: Family, start: Position | None = None, stage: int = 0) -> None:
        start = start or Position()
        self.names = tuple(prepared.prefixes)
        if unknown := sorted(set(start.consumed) - set(self.names)):
            raise DataError(f"position contains the source {unknown[0]!r}; the family has {', '.join(self.names)}")
        self._sources = [_SourceSamples(name, prepared, family, Split.train, family.seed, stage) for name in self.names]
        pair.check_train(family, {source.name: source.part for source in self._sources})
        self._weights = _weights(family)
        # Samples consumed from each source before each block so far: any block can be computed again from them.
        self._counts = [np.array([start.consumed.get(name, 0) for name in self.names], dtype=np.int64)]
        self._block = functools.lru_cache(maxsize=_KEPT)(self._make_block)

    def sample(self, i: int) -> Sample:
        """Return the i-th sample after the start, i from 0.

        Not collective: a rank may request any sample at any time.
        """
        block = self._block_at(i // _BLOCK)
        source = self._sources[int(block.source[i % _BLOCK])]
        return source.sample(int(block.index[i % _BLOCK]))

    def position_after(self, n: int) -> Position:
        """Return the position n samples after the start."""
        block = self._block_at(n // _BLOCK)
        counts = self._counts[n // _BLOCK] + self._count_by_source(block.source[: n % _BLOCK])
        return Position({name: int(count) for name, count in zip(self.names, counts, strict=True)})

    def _block_at(self, number: int) -> BlendedSamples:
        """Return a block of the blend, after computing the blocks before it where needed."""
        if number < 0:
            raise IndexError("samples are numbered from 0")
        while len(self._counts) <= number:
            self._counts.append(self._counts[-1] + self._count_by_source(self._block(len(self._counts) - 1).source))
        return self._block(number)

    def _make_block(self, number: int) -> BlendedSamples:
        return blend(self._weights, self._counts[number], _BLOCK)

    def _count_by_source(self, source: np.ndarray) -> np.ndarray:
        return np.bincount(source, minlength=len(self.names))


class ValidationSamples(Sequence[Sample]):
    """The first samples of the validation split, the same for every seed of the family."""

    def __init__(self, sources: Sequence["_SourceSamples"], samples: BlendedSamples) -> None:
        self._sources, self._samples = sources, samples

    def __len__(self) -> int:
        return len(self._samples.source)

    def __getitem__(self, i: Any) -> Any:
        """Return sample i, or a list of samples for a slice."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._sources[self._samples.source[i]].sample(int(self._samples.index[i]))


def validation_samples(prepared: Prepared, family: Family) -> ValidationSamples:
    """Return the first `evaluation.eval_samples` samples of the validation split, blended by weight.

    They have the length of the first stage's samples in all stages, so that losses before and after a growth compare.

    A smaller split is used as a whole, with a warning; DataError if it has no sample.
    """
    sources = [_SourceSamples(name, prepared, family, Split.valid, _VALIDATION_SEED) for name in prepared.prefixes]
    pair.check_valid(family, {source.name: source.part for source in sources})
    wanted, sizes = family.evaluation.eval_samples, np.array([source.samples for source in sources])
    return ValidationSamples(sources, blend(_weights(family), np.zeros_like(sizes), wanted, sizes))


def _weights(family: Family) -> np.ndarray:
    return np.array([source.weight for source in family.data.sources], dtype=np.float64)


class _SourceSamples:
    """The endless sequence of samples of one source in one split, epoch after epoch."""

    def __init__(self, name: str, prepared: Prepared, family: Family, split: Split, seed: int, stage: int = 0) -> None:
        self.name, self.split, self.seed = name, split, seed
        self.prefix, self.vocab_size = str(prepared.prefixes[name]), prepared.vocab_size
        self.cache, self.split_ratio = prepared.directory / "cache", family.data.split
        self.seq_length = family.stages[stage].model.seq_length
        self._tokens = GPTDataset.build_low_level_dataset(self.prefix, self._config(epoch=0))
        begin, end = pair.bounds(self.split_ratio, len(self._tokens), split.name)
        self._documents = np.arange(begin, end, dtype=np.int32)
        tokens = int(self._tokens.sequence_lengths[begin:end].sum(dtype=np.int64))
        self.part = pair.Part(end - begin, tokens, len(self._tokens))
        self.samples = pair.samples_of(tokens, self.seq_length)
        self._open_epochs: collections.OrderedDict[int, _ShuffledEpoch] = collections.OrderedDict()

    def sample(self, i: int) -> Sample:
        """Return sample i of this source, i from 0 without end."""
        epoch, index = divmod(i, self.samples)
        sample: Sample = self._epoch(epoch)[index]
        # Megatron returns the same two tensors each time: without a copy, changing one sample changes the next.
        return sample | {key: sample[key].clone() for key in ("loss_mask", "position_ids")}

    def _epoch(self, epoch: int) -> "_ShuffledEpoch":
        if epoch not in self._open_epochs:
            self._open_epochs[epoch] = _ShuffledEpoch(
                f"{self.name}.{self.split.name}.{epoch}",
                self._tokens, self.prefix, self._documents, None, self.split, self._config(epoch),
            )  # fmt: skip
            self._remove_finished_epochs(epoch)
            if len(self._open_epochs) > _KEPT:
                self._open_epochs.popitem(last=False)
        self._open_epochs.move_to_end(epoch)
        return self._open_epochs[epoch]

    def _remove_finished_epochs(self, epoch: int) -> None:
        """Remove the cache files of epochs that no rank reads any more: those before the last one and this one.

        They can be drawn again, as after a roll back. A rank that still has such a file mapped can go on reading it.
        """
        own = re.compile(re.escape(f"{self.name}.{self.split.name}.") + r"(\d+)\.")
        for path in self.cache.glob("*.npy"):
            found = own.match(path.name)
            if _OLD_CACHE.fullmatch(path.name) or (found and int(found[1]) <= epoch - _KEPT):
                path.unlink(missing_ok=True)

    def _config(self, epoch: int) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            random_seed=(self.seed + epoch) % 2**32,
            sequence_length=self.seq_length,
            blend=([self.prefix], None),
            split=self.split_ratio,
            path_to_cache=str(self.cache),
            tokenizer=_NoTokenizer(self.vocab_size),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )


class _ShuffledEpoch(GPTDataset):  # type: ignore[misc]  # Megatron's class is untyped
    """One pass over the documents, shuffled.

    Only the construction of the sample order differs from Megatron's, where rank 0 builds and saves it while the others
    wait at a barrier: a rank could not start an epoch on its own, and a kill could leave half a cache file that later
    runs trust.
    """

    def __init__(self, stem: str, *arguments: Any) -> None:
        """Args: source, split and epoch, for the names of the cache files; and Megatron's own arguments."""
        self._stem = stem
        super().__init__(*arguments)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document [documents], sample [samples + 1, 2] and shuffle [samples] indices, cached if possible."""
        stem = f"{self._stem}.{self.unique_description_hash}"
        paths = [Path(self.config.path_to_cache) / f"{stem}-{kind}.npy" for kind in ("document", "sample", "shuffle")]
        try:
            document, sample, shuffle = (np.load(path, mmap_mode="r") for path in paths)
        except FileNotFoundError:
            document, sample, shuffle = self._draw()
            for path, array in zip(paths, (document, sample, shuffle), strict=True):
                with replacing(path) as temporary, open(temporary, "wb") as stream:
                    np.save(stream, array)
            with contextlib.suppress(FileNotFoundError):  # a faster rank has finished the epoch and removed them
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
    """The attributes of a tokenizer that GPTDataset needs for tokenized text.

    There is no `pad`, so Megatron uses -1, which is no token: no real token is masked or replaced by 0.
    """

    eod = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = {"vocab_size": vocab_size}
