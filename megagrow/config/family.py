"""A family: ordered stages that share one tokenizer and one data stream, and how each grows from the one before."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megagrow.config.base import Section, Seed
from megagrow.config.cluster import Cluster, JobResources
from megagrow.config.file_names import BESIDE_STAGES, DATA, JOBS, RECORDS
from megagrow.config.function import check_growth
from megagrow.config.shape import ModelShape
from megagrow.config.stage import Batch, ParallelLayout, Schedule, Training, check_layout, check_sharding
from megagrow.config.user_paths import UserPath, UserText, reads_directory


class GrowthConfig(Section):
    """How a stage's first checkpoint is made from the last checkpoint of the stage before.

    Each axis names an operator that `megagrow.growth` registers; docs/operators.md lists them.
    """

    hidden: str = "zero_pad"
    ffn: str = "zero_pad"
    head: str = Field("zero_pad", description="query heads and, with them, KV groups")
    layer: str = "identity"
    vocab: str = "fresh"
    expert: str | None = Field(
        None, description="default: upcycle if a dense stage gains experts, otherwise duplicate_experts"
    )
    new_layers: Literal["fresh", "copy"] = Field(
        "fresh",
        description="weights inside an identity layer: random, or its source's; either way it outputs zero at first",
    )
    moments: Literal["exact", "copy", "asymmetric", "reset"] = "asymmetric"
    share_of_new: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="combined share of all new copies of an entry; default: equal shares for all copies",
    )
    noise: float = Field(0.0, ge=0, description="relative noise on new copies; above 0 the growth is not exact")
    shrink: float = Field(0.4, gt=0, le=1, description="szp: factor on the old weights")
    granularity: int = Field(1, gt=0, description="upcycle: slices of the dense MLP, one per expert")
    router_noise: float = Field(
        0.01,
        ge=0,
        description="duplicate_experts: noise on new router rows, relative to the router's standard deviation",
    )

    def operators(self) -> dict[str, str]:
        """Operator by axis; `expert` only if one is named."""
        named = {"hidden": self.hidden, "ffn": self.ffn, "head": self.head, "layer": self.layer, "vocab": self.vocab}
        return named if self.expert is None else {**named, "expert": self.expert}


class Stage(Section):
    """One member of the family."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelShape
    parallel: ParallelLayout = ParallelLayout()
    batch: Batch
    schedule: Schedule = Schedule()
    load: UserPath | None = Field(
        None,
        description="first stage only: begin with this checkpoint, of Megatron-LM, DCP or Hugging Face, instead of new "
        "weights",
    )
    finished: bool = Field(
        False, description="with load: take that checkpoint as this stage's finished model and train nothing"
    )
    growth: GrowthConfig = GrowthConfig()
    precision: Literal["bf16", "fp32"] = "bf16"
    train_tokens: int | Literal["auto"] = Field("auto", description="training tokens; auto: what the budget leaves")
    recompute_granularity: Literal["full", "selective"] | None = None
    export: Literal["huggingface"] | None = Field(
        None, description="also export the trained stage in this format, to <save>/<stage>/huggingface"
    )
    cluster: JobResources = Field(JobResources(), description="overrides for this stage's training job")

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_layout(self.model, self.parallel, self.batch)
        if self.finished and self.load is None:
            raise ValueError("finished true needs load: the checkpoint that is this stage's finished model")
        if self.finished and self.train_tokens != "auto":
            raise ValueError(f"finished true trains nothing: leave out train_tokens {self.train_tokens}, or finished")
        if isinstance(self.train_tokens, int) and self.train_tokens < self.tokens_per_step:
            raise ValueError(f"train_tokens {self.train_tokens} is less than one step of {self.tokens_per_step} tokens")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.batch.global_batch_size * self.model.seq_length


class Budget(Section):
    """How long each stage trains if its `train_tokens` is auto."""

    tokens_per_parameter: float = Field(20.0, gt=0, description="for a model trained independently")
    rule: Literal["6NT", "exact"] = Field("6NT", description="how the budget counts FLOPs: 6 N T, or layer by layer")


class LearningRateRule(Section):
    """Peak learning rate of a stage without a max_lr: constant, or reference * (N / N_ref) ** -exponent."""

    rule: Literal["constant", "power"] = "constant"
    reference: float = Field(1e-3, gt=0, description="constant: peak of every stage; power: peak at N_ref")
    reference_parameters: float | None = Field(None, gt=0, description="N_ref; default: the first stage's N")
    exponent: float = Field(0.5, ge=0, description="0.5: four times the parameters halve the rate")


STDLIB = "python-stdlib"
"""The path of a source that stands for Python's own sources."""


class TokenizerConfig(Section):
    """A tokenizer read from a file, or a SentencePiece model trained on the family's own text."""

    tokenizer_type: Literal["SentencePiece", "HuggingFace"] = "SentencePiece"
    tokenizer_model: UserPath | None = Field(
        None, description="a .model file, or a directory or file with tokenizer.json; default: train on data.sources"
    )
    model_type: Literal["bpe", "unigram"] = Field("bpe", description="type of the SentencePiece model to train")
    character_coverage: float = Field(0.9995, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tokenizer_type == "HuggingFace" and self.tokenizer_model is None:
            raise ValueError("tokenizer_type HuggingFace needs tokenizer_model: a path with tokenizer.json")
        return self


class DataSource(Section):
    """One source of the data blend: raw text, or the prefix of a tokenized .bin/.idx pair."""

    name: str = Field("corpus", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    paths: tuple[UserText, ...] = Field(
        (),
        description="files, directories or globs of .txt .md .py .jsonl, optionally .gz or .zst, and .parquet; or "
        "'python-stdlib'",
    )
    prefix: UserText | None = Field(None, description="path of an existing .bin/.idx pair, without the suffix")
    json_key: str = Field("text", description="JSONL field that holds the text of a document")
    weight: float = Field(1.0, gt=0, description="share of the blend, relative to the other sources")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.paths) == bool(self.prefix):
            raise ValueError(f"source {self.name!r} needs either paths (raw text) or prefix (.bin/.idx), not both")
        return self


class Data(Section):
    """The text, its split into training, validation and test documents, and how it is tokenized."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    split: str = Field(
        "949,50,1",
        pattern=r"^\d+(\.\d+)?(,\d+(\.\d+)?){2}$",
        description="weights of train, validation and test, by documents",
    )
    append_eod: bool = Field(True, description="append an end-of-document token to every document")
    workers: int = Field(0, ge=0, description="tokenizer processes; 0: one per core")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"two sources have the same name: {names}")
        if float(self.split.split(",")[0]) <= 0 or float(self.split.split(",")[1]) <= 0:
            raise ValueError(
                f"split {self.split} leaves no training or no validation documents; set the first two weights above 0"
            )
        return self


class Evaluation(Section):
    """Validation, always on the same samples, so that losses of different stages are comparable."""

    eval_interval: int = Field(100, gt=0, description="steps between validations")
    eval_samples: int = Field(64, gt=0, description="validation samples, counted from the first")


class Checkpointing(Section):
    """When checkpoints are written, and how many are kept."""

    save_interval: int = Field(100, gt=0, description="steps between checkpoints")
    keep: int = Field(2, gt=0, description="newest checkpoints to keep; the last one of a stage is always kept")
    async_save: bool = Field(False, description="write while training continues")
    verify_on_load: bool = Field(True, description="compare checksums before a checkpoint is loaded")


class Wandb(Section):
    """Weights & Biases. WANDB_* variables are honored; without an API key, runs are offline."""

    enabled: bool = False
    project: str = "megagrow"
    entity: str | None = None


class Trackers(Section):
    """Trackers that also receive the training records."""

    wandb: Wandb = Wandb()
    tensorboard: bool = False


class Family(Section):
    """A family.yaml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: Seed = 1234
    save: UserPath = Field(description="directory for everything that the family writes")
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: Data
    budget: Budget = Budget()
    learning_rate: LearningRateRule = LearningRateRule()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpointing = Checkpointing()
    trackers: Trackers = Trackers()
    training: Training = Training()
    cluster: Cluster | None = Field(None, description="for `megagrow launch`; `megagrow run` does not need it")
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have the same name: {names}")
        for index, name in enumerate(names):
            if name in BESIDE_STAGES:
                raise ValueError(
                    f"stages.{index}.name {name!r} is taken: <save>/{name} is {BESIDE_STAGES[name]}; choose another"
                )
            if index > 0 and self.stages[index].load is not None:
                raise ValueError(
                    f"stages.{index}.load: only the first stage begins with a checkpoint; {name!r} grows from "
                    f"{names[index - 1]!r}: leave load out, or remove the stages before it"
                )
        for small, large in zip(self.stages, self.stages[1:], strict=False):
            step = f"growth from stage {small.name!r} to {large.name!r}"
            check_growth(step, small.model, large.model, large.growth.granularity)
            _check_shared_data(step, small.model, large.model)
            _check_validation(self.stages[0].model.seq_length, large)
        self._check_corpus(names)
        return self

    def _check_corpus(self, stages: list[str]) -> None:
        """Raise ValueError if a source would read the records and settings in `save` as text."""
        inside = {DATA, JOBS, RECORDS, *stages}
        for source in self.data.sources:
            for path in source.paths:
                if path != STDLIB and reads_directory(path, self.save, inside):
                    raise ValueError(
                        f"save {str(self.save)!r} is inside the corpus {path!r} of source {source.name!r}, which would "
                        "read the family's own files as text; choose a directory elsewhere, or one with a leading dot"
                    )

    def stage_index(self, wanted: str) -> int:
        """Index of a stage, given its name or number; ValueError lists the stages."""
        names = [stage.name for stage in self.stages]
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < len(names):
            return int(wanted)
        raise ValueError(f"no stage {wanted!r}; the stages are {', '.join(names)} (0 to {len(names) - 1})")


def _check_validation(length: int, stage: Stage) -> None:
    """Raise ValueError if a stage's layout cannot cut the validation samples, which have the first stage's length."""
    shape = stage.model
    if shape.position_embedding_type == "learned_absolute" and shape.positions < length:
        raise ValueError(
            f"stage {stage.name!r}: it has {shape.positions} learned positions; validation samples have the first "
            f"stage's seq_length {length}"
        )
    try:
        check_sharding(stage.model.model_copy(update={"seq_length": length}), stage.parallel)
    except ValueError as error:
        raise ValueError(
            f"stage {stage.name!r}: {error}, which is that of the first stage and of all validation samples"
        ) from None


def _check_shared_data(step: str, small: ModelShape, large: ModelShape) -> None:
    """Raise ValueError if two stages cannot read tokens of one tokenizer."""
    if large.vocab_size < small.vocab_size:
        raise ValueError(
            f"{step}: vocab_size shrinks from {small.vocab_size} to {large.vocab_size}; a target must not be smaller"
        )
