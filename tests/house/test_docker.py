"""The images as text: what they copy, run and promise exists, and nothing about them is left to chance.

They are built and run for real, which takes minutes, by tools/proofs/docker_steps.py.
"""

import fnmatch
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import megagrow
from tests.house.test_readme import help_of
from tools.docs.package_imports import ROOT

FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
HADOLINT = Path(sys.executable).with_name("hadolint")
IN_THE_IMAGE = {"python", "pip", "megagrow"}  # made by the base or by an earlier step
LABELS = {"title", "description", "licenses", "version", "revision", "created"}
SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, its arguments on one line), without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n", " ", lines)
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path from the engine: the last pattern that names it, or a folder of it, counts."""
    parts, answer = Path(path).parts, False
    above = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        names = [*above, *parts] if glob.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, glob.removeprefix("**/")) for name in names if glob != "*" or "/" not in name):
            answer = not pattern.startswith("!")
    return answer


def copied(text: str) -> list[str]:
    """Sources of COPY."""
    return [source for word, rest in instructions(text) if word == "COPY" for source in shlex.split(rest)[:-1]]


def commands(text: str) -> list[list[str]]:
    """Every command of RUN, split into words."""
    runs = [rest for word, rest in instructions(text) if word == "RUN"]
    return [shlex.split(command) for run in runs for command in re.split(r"\s(?:&&|\|\||\||;)\s", run)]


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile, by rules that need nothing but its text; hadolint knows many more."""
    steps = instructions(text)
    words = [word for word, _ in steps]
    found = []
    for word, rest in steps:
        name, _, value = rest.partition("=")
        if word == "ARG" and f"${{{name}}}" not in text:
            found.append(f"ARG {name} is never used")
        if word == "ARG" and name.endswith("IMAGE") and not re.search(r":(?!latest)[\w.-]*\d", value):
            found.append(f"{value} names no version")
        if word in ("ARG", "ENV"):
            found += [f"{key} may be a secret" for key in re.findall(r"(\w+)=", rest) if SECRET.search(key)]
    if "SHELL" not in words[: words.index("RUN")] or "pipefail" not in dict(steps)["SHELL"]:
        found.append("a pipe in RUN may fail unseen")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*", users[-1]):
        found.append("it ends as root, or as a name that the host may not know")
    if missing := LABELS - set(re.findall(r"org\.opencontainers\.image\.(\w+)=", dict(steps).get("LABEL", ""))):
        found.append(f"no label {', '.join(sorted(missing))}")
    for command in commands(text):
        if "pip" in command[:3] and "install" in command and not {"--constraint", "--no-deps"} & set(command):
            found.append(f"not pinned: {' '.join(command)}")
    return found


@functools.cache
def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _patterns() -> list[str]:
    return [line for line in _text(".dockerignore").splitlines() if line and not line.startswith("#")]


@functools.cache
def _tool():
    spec = importlib.util.spec_from_file_location("image_constraints", ROOT / "docker/image_constraints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_keeps_the_rules(name):
    assert faults(_text(name)) == []


def test_every_rule_can_be_broken():
    bad = "ARG BASE_IMAGE=python:latest\nFROM ${BASE_IMAGE}\nARG SPARE=1\nENV HF_TOKEN=x\n"
    bad += "RUN pip install torch \\\n  && true\nUSER root\nLABEL org.opencontainers.image.title=x\n"
    expected = ["names no version", "SPARE is never used", "HF_TOKEN may be", "pipe", "root", "no label", "not pinned"]
    assert len(faults(bad)) == len(expected)
    assert all(any(text in fault for fault in faults(bad)) for text in expected)


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_reaches_the_engine(name):
    sources = copied(_text(name))
    assert {"constraints.txt", "setup.py", "megagrow", "examples"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if ignored(source, _patterns())] == []


@pytest.mark.parametrize("path", [".git/config", ".env", "runs/demo/x", "tests", ".venv/bin/python", "docs/a.md"])
def test_nothing_else_reaches_the_engine(path):
    assert ignored(path, _patterns())


@pytest.mark.parametrize(
    ("path", "expected"), [("a/b", True), ("a/keep", False), ("a/keep/c", False), ("a/keep/__pycache__/d", True)]
)
def test_the_last_pattern_counts(path, expected):
    assert ignored(path, ["*", "!a/keep", "**/__pycache__"]) is expected


@pytest.mark.parametrize("name", FILES)
def test_every_command_exists(name):
    called = {command[0] for command in commands(_text(name))}
    assert "megagrow" in called, "a step must try that megagrow starts"
    found = {word for word in called - IN_THE_IMAGE if _is_a_command(word)}
    assert called - IN_THE_IMAGE - found == set()


def _is_a_command(word: str) -> bool:
    return subprocess.run(["bash", "-c", 'type -- "$1"', "bash", word], capture_output=True).returncode == 0


def test_a_command_that_does_not_exist_is_seen():
    assert _is_a_command("useradd") and not _is_a_command("useradded")


@pytest.mark.parametrize(
    ("name", "extras"), [("docker/Dockerfile", "corpus,hf,plots,tensorboard"), ("docker/Dockerfile.cpu", "plots")]
)
def test_the_image_has_the_extras_that_its_users_need(name, extras):
    assert any(command[-1] == f".[{extras}]" for command in commands(_text(name)) if "--constraint" in command)


@pytest.mark.parametrize("name", FILES)
def test_what_the_image_starts_exists(name):
    steps = dict(instructions(_text(name)))
    assert steps["ENTRYPOINT"] == '["megagrow"]'
    verb, *arguments = re.findall(r'"([^"]+)"', steps["CMD"])
    assert verb == "--help" or help_of(verb)
    assert all((ROOT / argument).exists() for argument in arguments)
    assert (steps["WORKDIR"], "COPY examples /home/megagrow/examples" in _text(name)) == ("/home/megagrow", True)


@pytest.mark.parametrize("name", FILES)
def test_any_user_may_write_to_home(name):
    assert "chmod 1777 /home/megagrow" in _text(name) and "HOME=/home/megagrow" in _text(name)


@pytest.mark.parametrize("name", FILES)
def test_dependencies_come_before_the_source(name):
    steps = [f"{word} {rest}" for word, rest in instructions(_text(name))]
    installs = [number for number, step in enumerate(steps) if step.startswith("RUN") and "--constraint" in step]
    assert installs and max(installs) < steps.index("COPY megagrow megagrow")


@pytest.mark.parametrize("name", FILES)
def test_the_version_is_megagrows(name):
    assert f"ARG VERSION={megagrow.__version__}\n" in _text(name)


@pytest.mark.parametrize("name", [*FILES, "docker/README.md"])
def test_tags_name_the_version(name):
    tags = set(re.findall(r"\bmegagrow:([\w.]+)", _text(name)))
    assert tags and {tag.removesuffix(".") for tag in tags} == {megagrow.__version__}


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint is not installed (extra dev)")
@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name):
    command = [str(HADOLINT), "--no-color", "--config", "docker/hadolint.yaml", name]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout + answer.stderr) == (0, "")


@pytest.mark.parametrize(
    ("pin", "installed", "expected"),
    [
        ("torch==2.13.0", {"torch": "2.10.0a0+b4e4.nv26.1"}, "torch==2.10.0a0+b4e4.nv26.1"),
        ("numpy==2.4.6", {"numpy": "1.26.4"}, "numpy==1.26.4"),
        ("ruff==0.17.6  # for lint", {"transformer_engine": "2.11.0+x"}, "transformer-engine==2.11.0+x\nruff==0.17.6"),
        ("packaging==26.3", {"packaging": "23.2"}, "packaging>=23.2,<=26.3"),
        ("Jinja2==3.1.6", {"jinja2": "3.1.6"}, "jinja2==3.1.6"),
        ("rich==15.0.0", {"rich": "15.1"}, ""),
        ("# a comment", {"rich": "15.1"}, ""),
    ],
)
def test_a_pin_becomes_the_mildest_constraint(pin, installed, expected):
    tool = _tool()
    installed = {tool.normal(name): version for name, version in installed.items()}
    assert "\n".join(tool.constraints([pin], installed)) == expected


def test_the_images_constraints_hold_torch_and_forget_no_pin():
    tool = _tool()
    ours = _text("constraints.txt").splitlines()
    pinned = {tool.normal(line.partition("==")[0]) for line in ours if "==" in line.partition("#")[0]}
    lines = [
        Requirement(line) for line in tool.constraints(ours, {"torch": "2.10.0a0+x", "numpy": "1.26.4", "click": "8.0"})
    ]
    bounds = {line.name: str(line.specifier) for line in lines}
    assert bounds["torch"] == "==2.10.0a0+x" and bounds["numpy"] == "==1.26.4"
    assert pinned - set(bounds) == {"setuptools"}, "what builds is the image's own"


def test_what_this_python_sees_is_held_as_it_is():
    tool = _tool()
    assert {line.partition("==")[0] for line in tool.held(tool.found())} >= {"torch", "numpy"}
