"""family.yaml: rules and their numbers, the nearest key, overrides, defaults, and yaml that reads back equal."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megagrow.config import Family, load, load_text, to_yaml
from megagrow.config.paths import FamilyPaths
from megagrow.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))
TREE: dict[str, Any] = {
    "name": "tiny",
    "save": "runs/tiny",
    "data": {"sources": [{"paths": ["a.txt"]}]},
    "defaults": {
        "model": {
            "num_layers": 4,
            "hidden_size": 16,
            "ffn_hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 4,
            "vocab_size": 100,
            "make_vocab_size_divisible_by": 8,
            "seq_length": 16,
        },
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "precision": "fp32",
    },
    "stages": [{"name": "small"}, {"name": "large", "model": {"hidden_size": 24}}],
}


def family(*overrides: str, **top: Any) -> Family:
    return load_text(yaml.safe_dump({**copy.deepcopy(TREE), **top}), overrides)


def message(*overrides: str, **top: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        family(*overrides, **top)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Rules: what is set, and what the error must contain

MODEL, PARALLEL = "defaults.model", "defaults.parallel"
RULES: dict[str, tuple[list[str], str]] = {
    "heads by tp": (
        [f"{PARALLEL}.tensor_model_parallel_size=3"],
        "family: stages.0: tensor_model_parallel_size 3 does not divide num_attention_heads 4",
    ),
    "groups by tp": (
        [f"{PARALLEL}.tensor_model_parallel_size=4"],
        "tensor_model_parallel_size 4 does not divide num_query_groups 2",
    ),
    "ffn by tp": (
        [f"{PARALLEL}.tensor_model_parallel_size=2", f"{MODEL}.ffn_hidden_size=33"],
        "tensor_model_parallel_size 2 does not divide ffn_hidden_size 33",
    ),
    "vocabulary by tp": (
        [
            f"{PARALLEL}.tensor_model_parallel_size=2",
            f"{MODEL}.make_vocab_size_divisible_by=5",
            f"{MODEL}.vocab_size=5",
        ],
        "tensor_model_parallel_size 2 does not divide padded vocabulary 5",
    ),
    "layers by pp": (
        [f"{PARALLEL}.pipeline_model_parallel_size=3"],
        "pipeline_model_parallel_size 3 x virtual_pipeline_model_parallel_size 1 = 3 does not divide num_layers 4",
    ),
    "layers by pp x vpp": (
        [f"{PARALLEL}.pipeline_model_parallel_size=2", f"{PARALLEL}.virtual_pipeline_model_parallel_size=4"],
        "pipeline_model_parallel_size 2 x virtual_pipeline_model_parallel_size 4 = 8 does not divide num_layers 4",
    ),
    "vpp without pp": (
        [f"{PARALLEL}.virtual_pipeline_model_parallel_size=2"],
        "virtual_pipeline_model_parallel_size 2 needs pipeline_model_parallel_size above 1",
    ),
    "interleaved micro-batches": (
        [
            f"{PARALLEL}.pipeline_model_parallel_size=2",
            f"{PARALLEL}.virtual_pipeline_model_parallel_size=2",
            "defaults.batch.global_batch_size=6",
        ],
        "pipeline_model_parallel_size 2 does not divide the 3 micro-batches per step",
    ),
    "batch by dp": (
        [f"{PARALLEL}.data_parallel_size=3"],
        "micro_batch_size 2 x data_parallel_size 3 = 6 does not divide global_batch_size 8",
    ),
    "sp without tp": (
        [f"{PARALLEL}.sequence_parallel=true"],
        "sequence_parallel needs tensor_model_parallel_size above 1",
    ),
    "sequence by tp": (
        [f"{PARALLEL}.sequence_parallel=true", f"{PARALLEL}.tensor_model_parallel_size=2", f"{MODEL}.seq_length=15"],
        "sequence_parallel: tensor_model_parallel_size 2 does not divide seq_length 15",
    ),
    "sequence by cp": (
        [f"{PARALLEL}.context_parallel_size=3"],
        "2 x context_parallel_size 3 does not divide seq_length 16",
    ),
    "experts": ([f"{PARALLEL}.expert_model_parallel_size=2"], "expert_model_parallel_size 2 needs num_moe_experts"),
    "hidden by heads": (
        [f"{MODEL}.kv_channels=null", f"{MODEL}.num_attention_heads=6"],
        "num_attention_heads 6 does not divide hidden_size 16: set kv_channels",
    ),
    "heads by groups": ([f"{MODEL}.num_query_groups=3"], "num_query_groups 3 does not divide num_attention_heads 4"),
    "odd rope": ([f"{MODEL}.kv_channels=5"], "rope needs an even head_dim, not 5"),
    "positions": (
        [f"{MODEL}.position_embedding_type=learned_absolute", f"{MODEL}.max_position_embeddings=8"],
        "max_position_embeddings 8 is below seq_length 16",
    ),
    "schedule": (
        [
            "defaults.schedule.lr_decay_style=WSD",
            "defaults.schedule.lr_warmup_fraction=0.5",
            "defaults.schedule.lr_wsd_decay_fraction=0.6",
        ],
        "lr_warmup_fraction 0.5 and lr_wsd_decay_fraction 0.6 add up to more than 1",
    ),
    "no step": (["stages.1.train_tokens=100"], "stages.1: train_tokens 100 is less than one step of 128 tokens"),
    "tokenizer": (["tokenizer.tokenizer_type=HuggingFace"], "tokenizer_type HuggingFace needs tokenizer_model"),
    "source without text": (["data.sources.0.paths=[]"], "source 'corpus' needs either paths (raw text) or prefix"),
    "source with two": (["data.sources.0.prefix=x"], "source 'corpus' needs either paths (raw text) or prefix"),
    "two sources": (
        ["data.sources=[{paths: [a]}, {paths: [b]}]"],
        "two sources have the same name: ['corpus', 'corpus']",
    ),
    "split": (['data.split="0,1,1"'], "split 0,1,1 leaves no training or no validation documents"),
    "split form": (['data.split="90,10"'], "data.split: String should match pattern"),
    "two stages": (["stages.1.name=small"], "two stages have the same name: ['small', 'small']"),
    "shrinking": (
        ["stages.1.model.hidden_size=8"],
        "growth from stage 'small' to 'large': hidden_size shrinks from 16 to 8; a target must not be smaller",
    ),
    "fewer layers": (["stages.1.model.num_layers=2"], "num_layers shrinks from 4 to 2"),
    "narrower": (["stages.1.model.ffn_hidden_size=16"], "ffn_hidden_size shrinks from 32 to 16"),
    "fewer heads": (["stages.1.model.num_attention_heads=2"], "num_attention_heads shrinks from 4 to 2"),
    "fewer groups": (["stages.1.model.num_query_groups=1"], "num_query_groups shrinks from 2 to 1"),
    "head_dim": (
        ["stages.1.model.kv_channels=6"],
        "kv_channels changes from 4 to 6 (rotary frequencies and softmax scale would differ), which no operator can "
        "do; the target must have kv_channels: 4",
    ),
    "smaller vocabulary": (["stages.1.model.vocab_size=99"], "vocab_size shrinks from 100 to 99"),
    "norm": (["stages.1.model.normalization=LayerNorm"], "normalization changes from RMSNorm to LayerNorm"),
    "tied": (
        ["stages.1.model.untie_embeddings_and_output_weights=false"],
        "untie_embeddings_and_output_weights changes from True to False",
    ),
    "rotary": (["stages.1.model.rotary_base=500000"], "rotary_base changes from 10000 to 500000"),
    "not positive": (
        ["stages.0.model.num_layers=0"],
        "stages.0.model.num_layers: Input should be greater than 0, not 0",
    ),
    "not a number": (["stages.0.model.num_layers=many"], "stages.0.model.num_layers: Input should be a valid integer"),
    "not a choice": (["stages.0.precision=fp16"], "stages.0.precision: Input should be 'bf16' or 'fp32', not 'fp16'"),
    "a bad name": (["name=a/b"], "name: String should match pattern"),
    "no stages": (["stages=[]"], "stages: "),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named_with_its_numbers(rule: str) -> None:
    overrides, expected = RULES[rule]
    assert expected in message(*overrides)


def test_layouts_that_obey_the_rules_pass() -> None:
    layout = [f"{PARALLEL}.tensor_model_parallel_size=2", f"{PARALLEL}.pipeline_model_parallel_size=2"]
    made = family(*layout, f"{PARALLEL}.data_parallel_size=2", f"{PARALLEL}.sequence_parallel=true")
    assert made.stages[0].parallel.world_size == 8 and made.stages[0].parallel.describe() == "TP2 PP2 DP2 SP"
    assert family(f"{PARALLEL}.pipeline_model_parallel_size=2", f"{PARALLEL}.virtual_pipeline_model_parallel_size=2")
    assert family().stages[0].tokens_per_step == 128 and family().stages[0].parallel.describe() == "TP1"


# Keys


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.1.modle.num_layers=3", "stages.1.modle: unknown key; did you mean model?"),
        ("defaults.precison=fp32", "defaults.precison: unknown key; did you mean precision?"),
        ("defaults.model.hiden_size=3", "stages.0.model.hiden_size: unknown key; did you mean hidden_size?"),
        ("tokeniser.model_type=bpe", "tokeniser: unknown key; did you mean tokenizer?"),
        ("default.precision=fp32", "default: unknown key; did you mean defaults?"),
        ("data.sources.0.path=a", "data.sources.0.path: unknown key; did you mean paths?"),
        ("stages.0.growth.hiden=zero_pad", "stages.0.growth.hiden: unknown key; did you mean hidden?"),
        ("trackers.wandb.qqqq=1", "trackers.wandb.qqqq: unknown key; known here: enabled, project, entity"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, expected: str) -> None:
    assert expected in message(override)


def test_missing_keys_are_named() -> None:
    assert message(name=None).startswith("family: name: Input should be a valid string, not None")
    tree = {key: value for key, value in TREE.items() if key != "save"}
    with pytest.raises(ConfigError, match="^family: save: missing$"):
        load_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"^family: name: missing \(and 3 more\)$"):
        load_text("{}")


def test_every_section_is_frozen() -> None:
    made = family()
    for section in (made, made.stages[0], made.stages[0].model, made.data.sources[0], made.trackers.wandb):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), "x")
    assert hash(made) == hash(family()) and made == family()


# Overrides


def test_overrides_reach_every_kind_of_value() -> None:
    made = family(
        "stages.1.schedule.max_lr=3e-4",
        "stages.0.train_tokens=1e6",
        "data.sources.0.paths=[x.txt, y.txt]",
        "trackers.wandb.enabled=yes",
        "budget={tokens_per_parameter: 3}",
        "save=/tmp/a=b",
        "tokenizer.tokenizer_model=null",
        "evaluation.eval_interval=7",
        "evaluation.eval_interval=8",
    )
    assert made.stages[1].schedule.max_lr == 3e-4 and made.stages[0].schedule.max_lr is None
    assert made.stages[0].train_tokens == 1_000_000 and made.data.sources[0].paths == ("x.txt", "y.txt")
    assert made.trackers.wandb.enabled and made.budget.tokens_per_parameter == 3 and made.budget.rule == "6NT"
    assert made.save == Path("/tmp/a=b") and made.tokenizer.tokenizer_model is None
    assert made.evaluation.eval_interval == 8


def test_an_override_merges_into_a_section() -> None:
    made = family("stages.0.model={num_layers: 2}", "stages.0.batch={micro_batch_size: 4}")
    assert made.stages[0].model.num_layers == 2 and made.stages[0].model.hidden_size == 16
    assert made.stages[0].batch.micro_batch_size == 4 and made.stages[0].batch.global_batch_size == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages", "override 'stages': write it as key.key=value, such as stages.1.schedule.max_lr=3e-4"),
        ("=3", "override '=3': write it as key.key=value"),
        ("stages..name=a", "write it as key.key=value"),
        (
            "stages.7.name=a",
            "family: override 'stages.7.name=a' cannot be applied: stages has no entry 7: its 2 entries",
        ),
        ("stages.last.name=a", "stages has no entry last: its 2 entries are counted from 0"),
        ("stages.-1.name=a", "stages has no entry -1: its 2 entries are counted from 0"),
        ("name.first=a", "name is the value 'tiny' and has no key first"),
        ("name=[a", "override 'name=[a' cannot be applied: while parsing a flow sequence"),
        ("name={a: 1, a: 2}", "the key 'a' appears twice"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, not -1"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(override: str, expected: str) -> None:
    assert expected in message(override)


# Defaults


def test_defaults_are_below_every_stage_and_above_the_classes() -> None:
    made = family()
    assert [stage.model.hidden_size for stage in made.stages] == [16, 24]
    assert [stage.model.num_layers for stage in made.stages] == [4, 4]
    assert {stage.precision for stage in made.stages} == {"fp32"}
    assert {stage.model.normalization for stage in made.stages} == {"RMSNorm"}


def test_an_override_of_defaults_reaches_all_stages_that_do_not_set_the_key() -> None:
    made = family("defaults.precision=bf16", "defaults.model.hidden_size=20", "stages.0.precision=fp32")
    assert [stage.precision for stage in made.stages] == ["fp32", "bf16"]
    assert [stage.model.hidden_size for stage in made.stages] == [20, 24]


def test_defaults_may_be_missing_and_must_be_a_section() -> None:
    full = yaml.safe_load(to_yaml(family()))
    assert load_text(yaml.safe_dump(full)) == family() == load_text(yaml.safe_dump({**full, "defaults": None}))
    for wrong in ([1], "x", 3):
        assert "defaults must be a mapping with the keys of a stage" in message(defaults=wrong)
    assert "stages.0: Input should be a valid dictionary" in message(stages=["small"])
    assert "stages.0.name: missing" in message(stages=[None])
    assert "stages: Input should be a valid tuple, not 3" in message(stages=3)


def test_yaml_aliases_are_shared_but_not_overridden_together() -> None:
    text = yaml.safe_dump({**TREE, "stages": []}).replace("stages: []", "")
    text += "stages:\n- {name: a, schedule: &s {max_lr: 1e-3}}\n- {name: b, schedule: *s}\n"
    made = load_text(text, ["stages.1.schedule.max_lr=2e-3"])
    assert [stage.schedule.max_lr for stage in made.stages] == [1e-3, 2e-3]
    merged = text.replace("schedule: *s", "schedule: {<<: *s, max_lr: 5e-3, weight_decay: 0.3}")
    assert load_text(merged).stages[1].schedule.max_lr == 5e-3


# Text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not a family: the top level must be a mapping"),
        ("- a\n- b\n", "not a family: the top level must be a mapping"),
        ("just words", "not a family"),
        ("name: [a", "not valid yaml: while parsing a flow sequence"),
        ("name: a\nname: b\n", "not valid yaml: the key 'name' appears twice"),
        ("a: !!python/object/apply:os.system [true]", "not valid yaml: could not determine a constructor"),
        ("\tname: a", "not valid yaml"),
        ("when: 2026-99-99", "not valid yaml"),
        ("1: 2", "name: missing (and 4 more)"),
    ],
)
def test_text_that_is_not_a_family_is_named(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "family.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    errors = {"none.yaml": "No such file", "": "Is a directory", "binary.yaml": "codec can't decode"}
    for name, expected in errors.items():
        with pytest.raises(ConfigError, match=f"^{tmp_path / name}: cannot be read: .*{expected}"):
            load(tmp_path / name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_yaml_reads_back_equal(path: Path) -> None:
    made = load(path)
    assert load_text(to_yaml(made)) == made
    assert to_yaml(load_text(to_yaml(made))) == to_yaml(made)


@settings(deadline=None)
@given(
    lr=st.floats(1e-9, 1, exclude_min=True),
    tokens=st.integers(128, 10**15),
    nominal=st.floats(1e3, 1e13),
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z"),
)
def test_numbers_and_names_survive_yaml(lr: float, tokens: int, nominal: float, name: str) -> None:
    tree = copy.deepcopy(TREE)
    tree["stages"] = [{"name": name, "train_tokens": tokens, "schedule": {"max_lr": lr}}]
    tree["defaults"]["model"]["nominal_parameters"] = nominal
    made = load_text(yaml.safe_dump(tree))
    again = load_text(to_yaml(made))
    assert again == made and again.stages[0].name == name and again.stages[0].train_tokens == tokens
    assert again.stages[0].schedule.max_lr == lr and again.stages[0].model.nominal_parameters == nominal


@pytest.mark.parametrize(("text", "value"), [("1e9", 1e9), ("3E-4", 3e-4), ("1.5e3", 1500.0), ("-1e+2", -100.0)])
def test_numbers_are_written_as_people_write_them(text: str, value: float) -> None:
    if value > 0:
        assert family(f"learning_rate.reference_parameters={text}").learning_rate.reference_parameters == value
    else:
        assert "greater than 0, not -100.0" in message(f"learning_rate.reference_parameters={text}")


# Stages and paths


def test_a_stage_is_found_by_name_or_number() -> None:
    made = family()
    assert [made.stage_index(wanted) for wanted in ("small", "large", "0", "1")] == [0, 1, 0, 1]
    for wanted in ("2", "huge", "-1", "", "²"):
        with pytest.raises(ValueError, match=rf"no stage '{wanted}'; the stages are small, large \(0 to 1\)"):
            made.stage_index(wanted)


@pytest.mark.parametrize(("text", "last"), [("12\n", 12), ("0", 0), ("", None), ("²", None), ("\udcff", None)])
def test_the_last_iteration_is_the_one_in_the_tracker(tmp_path: Path, text: str, last: int | None) -> None:
    paths = FamilyPaths(family(f"save={tmp_path}")).stage(0)
    assert paths.last_iteration() is None
    paths.checkpoints.mkdir(parents=True)
    tracker = paths.checkpoints / "latest_checkpointed_iteration.txt"
    tracker.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert paths.last_iteration() == last
