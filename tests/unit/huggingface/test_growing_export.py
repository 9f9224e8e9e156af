"""`megagrow convert DIR OUT --to huggingface model.X=Y`: what it writes, and that it is what two commands write."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.index import DType, whole_box
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.make import GrownSource
from megagrow.convert.plan import plan_conversion
from megagrow.convert.targets.huggingface import HuggingFaceTarget
from megagrow.growth.operators import plan_growth
from tests.reference.command import ROOT, megagrow
from tests.reference.command_line import CommandLine
from tests.reference.command_line import megagrow as command_line
from tests.unit.huggingface.test_huggingface import SHAPES, random_store, tensors_of, write
from tests.unit.sources.test_named_refusals import with_states

__all__ = ["command_line"]
GROWTH = {"hidden_size": 36, "ffn_hidden_size": 28, "num_attention_heads": 6, "num_layers": 3}
FILES = {
    "tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "e"}', "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": [3, 5]}', "LICENSE": "as you like", "vocab.txt": "a",
    "README.md": "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- x\n---\n# Parent\nlicense: none of this\n",
}  # fmt: skip


def parent(place: Path, name: str = "llama") -> Path:
    """A random model with files beside it, as one downloads it."""
    write(HuggingFaceTarget(random_store(SHAPES[name]), SHAPES[name]), place)
    for file, text in FILES.items():
        (place / file).write_text(text)
    return place


def sizes(name: str) -> list[str]:
    """What a model grows into; heads in whole groups, and experts where there are any."""
    larger = GROWTH | ({"num_attention_heads": 20} if name == "mistral" else {})
    if name == "mixtral":
        larger = larger | {"num_moe_experts": 6, "moe_ffn_hidden_size": 18}
    if name == "gpt2":  # transformers' GPT-2 has heads that divide the hidden size
        larger = {"num_layers": 3, "ffn_hidden_size": 28}
    return [f"model.{key}={value}" for key, value in larger.items()]


@pytest.mark.parametrize("name", SHAPES)
def test_one_command_writes_what_two_do(tmp_path: Path, command_line: CommandLine, name: str) -> None:
    source, options = parent(tmp_path / "parent", name), sizes(name)
    said = command_line.done("convert", source, tmp_path / "one", "--to", "huggingface", *options)
    command_line.done("convert", source, tmp_path / "between", *options)
    command_line.done("convert", tmp_path / "between", tmp_path / "two", "--to", "huggingface")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)
    assert "layer identity" in said and ("; exact" in said or name == "mixtral")  # whose router is not exact
    for file in ("config.json", "growth.json", "new_parameters.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    check_new(tensors_of(source), one, json.loads((tmp_path / "one" / "new_parameters.json").read_text()))


def check_new(old: dict[str, Tensor], grown: dict[str, Tensor], new: dict[str, Any]) -> None:
    """What is not listed as new is as large as the parent, tensor by tensor; and everything listed is there."""
    assert new["layers"] == {"count": 3, "new": [1]} and new["tensors"]["count"] == len(grown)
    whole, partly = set(new["tensors"]["new"]), new["tensors"]["partly_new"]
    assert whole | set(partly) <= set(grown) and not whole & set(partly)
    before = sorted(values.numel() for values in old.values())
    left = []
    for name, values in grown.items():
        kept = list(values.shape)
        for each in partly.get(name, {"new": []})["new"]:
            kept[each["dim"]] -= sum(stop - start for start, stop in each["ranges"])
            assert all(0 <= start < stop <= values.shape[each["dim"]] for start, stop in each["ranges"])
        assert partly.get(name, {"shape": list(values.shape)})["shape"] == list(values.shape)
        if name not in whole:
            left.append(math.prod(kept))
    assert sorted(left) == before


def test_only_new_parts_differ_where_nothing_is_scaled(tmp_path: Path, command_line: CommandLine) -> None:
    """Padding of the MLP: what is not new holds the parent's values, in order."""
    source = parent(tmp_path / "parent")
    command_line.done("convert", source, tmp_path / "one", "--to", "huggingface", "model.ffn_hidden_size=28")
    new = json.loads((tmp_path / "one" / "new_parameters.json").read_text())["tensors"]["partly_new"]
    old, grown = tensors_of(source), tensors_of(tmp_path / "one")
    assert set(new) == {name for name in grown if ".mlp." in name}
    for name, values in grown.items():
        kept = values
        for each in new.get(name, {"new": []})["new"]:
            flags = torch.zeros(values.shape[each["dim"]], dtype=torch.bool)
            for start, stop in each["ranges"]:
                flags[start:stop] = True
            kept = kept.index_select(each["dim"], torch.nonzero(~flags).flatten())
        assert torch.equal(kept, old[name]), name


def test_everything_beside_the_weights_goes_with_them(tmp_path: Path, command_line: CommandLine) -> None:
    source = parent(tmp_path / "parent")
    command_line.done("convert", source, tmp_path / "one", "--to", "huggingface", "model.num_layers=4")
    for file, text in FILES.items():
        if file != "README.md":
            assert (tmp_path / "one" / file).read_text() == text, file
    card = (tmp_path / "one" / "README.md").read_text()
    head, body = card.split("---\n", 2)[1:]
    assert head.splitlines()[:2] == ["license: apache-2.0", "language: en"] and "none of this" not in card
    assert "New layers, counted from 0: 1, 3." in body and "| layers | 2 | 4 |" in body
    assert "# Grown from parent\n" in body
    command_line.done("convert", source, tmp_path / "between", "model.num_layers=4")
    command_line.done("convert", tmp_path / "between", tmp_path / "two", "--to", "huggingface")
    assert "# Grown from parent\n" in (tmp_path / "two" / "README.md").read_text()  # and not from what lay between
    shown = " ".join(command_line.done("inspect", tmp_path / "one").split())
    assert "new layers: 1, 3" in shown


def test_workers_and_a_second_run_change_nothing(tmp_path: Path) -> None:
    source = parent(tmp_path / "parent")
    words = ("convert", source, tmp_path / "one", "--to", "huggingface", *sizes("llama"))
    first = megagrow(*words, "--workers", 2)
    assert first.returncode == 0, first.stderr
    again = megagrow(*words)
    assert again.returncode == 2 and "already exists" in again.stderr
    shutil.move(tmp_path / "one", tmp_path / "kept")
    assert megagrow(*words).returncode == 0
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "kept")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_random_router_is_the_same_however_it_is_cut() -> None:
    """Noise on the rows of new experts is relative to all rows, so a part of a router cannot be made alone."""
    small = SHAPES["mixtral"]
    store = random_store(small)
    growth = GrowthConfig(router_noise=0.1, expert="duplicate_experts")
    step = plan_growth(small, small.model_copy(update={"num_moe_experts": 6}), growth, seed=1)
    conversion = plan_conversion(store.tensors, step, ParallelLayout(), DType.FLOAT32, optimizer=False)
    key = "decoder.layers.mlp.router.weight"
    source = GrownSource(conversion, store)
    whole = source.raw(key, whole_box(source.tensors[key].shape))
    assert step.experts is not None and step.experts.noise
    for start, stop in ((0, 2), (3, 5), (5, 6)):
        part = source.raw(key, ((1, 2), (start, stop), (0, small.hidden_size)))
        assert (part[0] == whole[1, start:stop]).all()


def test_what_only_the_older_format_cannot_do_is_said(tmp_path: Path, command_line: CommandLine) -> None:
    source = parent(tmp_path / "parent")
    error = command_line.refused("convert", source, tmp_path / "t", "--to", "legacy", "model.num_layers=4")
    assert "--to legacy cannot grow: convert to torch_dist first" in error
    error = command_line.refused("convert", source, tmp_path / "t", "--to", "huggingface", "--dry-run")
    assert "--dry-run --to huggingface: only conversions to torch_dist are planned" in error
    error = command_line.refused("convert", source, tmp_path / "t", "--to", "huggingface", "model.num_layers=1")
    assert "num_layers" in error and not (tmp_path / "t").exists()


def test_the_program_in_the_docs_trains_only_what_is_new(
    tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parent(tmp_path / "models" / "parent")
    larger = tmp_path / "models" / "larger"
    command_line.done("convert", source, larger, "--to", "huggingface", *sizes("llama"))
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs/huggingface.md").read_text(), re.DOTALL)
    assert program is not None
    model = torch.nn.Module()
    tensors = tensors_of(larger)
    named = {name: torch.nn.Parameter(values.clone()) for name, values in tensors.items()}
    monkeypatch.setattr(model, "named_parameters", lambda: named.items())
    monkeypatch.chdir(tmp_path)
    exec(program[1], {"model": model})  # noqa: S102  # our own page
    optimizer = torch.optim.AdamW(named.values(), lr=0.1, weight_decay=0.0)
    sum((parameter * (1 + parameter)).sum() for parameter in named.values()).backward()  # type: ignore[union-attr]  # a sum of tensors
    optimizer.step()
    new = json.loads((larger / "new_parameters.json").read_text())["tensors"]
    for name, parameter in named.items():
        moved = parameter.detach() != tensors[name]
        flags = torch.full(parameter.shape, name in new["new"])
        for each in new["partly_new"].get(name, {"new": []})["new"]:
            for start, stop in each["ranges"]:
                flags.narrow(each["dim"], start, stop - start).fill_(True)
        assert not moved[~flags].any(), name
        assert moved[flags].float().mean() > 0.9 if flags.any() else True, name


def test_a_tokenizer_that_the_arguments_name_is_named(tmp_path: Path, command_line: CommandLine) -> None:
    """A checkpoint may name any file, so the file is not read; a note tells the user which one to pass."""
    named = {"tokenizer_type": "GPTSentencePieceTokenizer", "tokenizer_model": "/data/own.model"}
    source = with_states(tmp_path / "source", {}, **named)
    code, _, error = command_line("convert", source, tmp_path / "out", "--to", "huggingface")
    assert code == 0 and "--tokenizer /data/own.model copies those" in " ".join(error.split()), error
