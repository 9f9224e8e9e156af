"""Build and run the images where there is neither a Docker engine nor a registry. As root, with two Debian packages:

    apt-get install --no-install-recommends buildah debootstrap
    python -m tools.proofs.docker_steps cpu          # or gpu; 3 to 5 minutes, 6 GB below /var/tmp/megagrow-images

The Dockerfiles themselves are built, by buildah, on bases that stand in for those that cannot be pulled: a Debian
with Python in /usr/local for python:slim; for NVIDIA's image a Debian that has what makes it difficult (a torch with a
pre-release version, numpy 1, an old packaging, constraints of its own, no ensurepip). Then what the image starts is
run as a user that it does not know. So every step is proved but one: that the real bases are like these.

PIP_* variables are handed on, and what they point at on this disk (certificates, wheels) is mounted.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = "ca-certificates python3.11-venv python3-distutils python3-lib2to3 python3-pip python3-setuptools".split()
STRANGER = "12345:12345"
LABELS = {"VERSION": "0.0.1", "REVISION": "0123abc", "CREATED": "2026-11-22T00:00:00Z"}
SHORT = [f"stages.{stage}.train_tokens=20480" for stage in range(3)]
"""Ten steps a stage of the demo, instead of five minutes."""

BASES = {
    "cpu": """
FROM localhost/debian
RUN python3.11 -m venv /usr/local
""",
    "gpu": """
FROM localhost/debian
RUN rm -r /usr/lib/python3.11/ensurepip && ln -s python3 /usr/bin/python
RUN pip install --break-system-packages {index} \\
        torch==2.13.0 numpy==1.26.4 packaging==23.2 protobuf==5.29.5 wheel setuptools
RUN cd /usr/local/lib/python3.11/dist-packages \\
 && mv torch-2.13.0*.dist-info torch-2.13.0a0+0123abc.nv26.1.dist-info \\
 && sed -i 's/^Version: .*/Version: 2.13.0a0+0123abc.nv26.1/' torch-*.dist-info/METADATA \\
 && mkdir /etc/pip && pip list --format freeze > /etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
""",
}
FILES = {"cpu": "docker/Dockerfile.cpu", "gpu": "docker/Dockerfile"}
DEMO = "examples/demo/family.yaml"
DATA = ["megagrow", "data", DEMO]
ALONE = ["torchrun", "--nproc-per-node=1", "-m", "megagrow", "train", DEMO, "--stage=small", SHORT[0]]


class Images:
    """buildah, with its images below one directory, and nothing shared with the machine's own."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._buildah = ["buildah", "--root", str(work / "store"), "--runroot", str(work / "run")]
        self._pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self._isolated = ["--isolation", "chroot", "--network", "host"]
        self._isolated += [f"--volume={value}:{value}:ro" for value in self._pip.values() if Path(value).is_absolute()]

    def debian(self, mirror: str) -> None:
        """Make localhost/debian, once."""
        if not (archive := self._work / "debian.tar").exists():
            tree = self._work / "debian"
            tree.mkdir(parents=True)
            include = "--include=" + ",".join(PACKAGES)
            _run(["debootstrap", "--variant=minbase", include, "bookworm", str(tree), mirror])
            part = archive.with_suffix(".part")
            _run(["tar", "-C", str(tree), "--exclude=./proc/*", "--exclude=./sys/*", "-cf", str(part), "."])
            part.rename(archive)
        settings = " ".join(f"{name}={value}" for name, value in self._pip.items())
        text = "FROM scratch\nADD debian.tar /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "
        self.build("localhost/debian", text + settings + "\n", self._work)

    def build(self, name: str, dockerfile: str, context: Path, **arguments: str) -> None:
        """Build a Dockerfile, given as text."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        # Docker's format: OCI's has no SHELL.
        command = [*self._buildah, "bud", "--layers", "--format=docker", *self._isolated, *given, "--tag", name]
        _run([*command, "--file", "-", str(context)], text=dockerfile)

    def configured(self, name: str) -> dict:
        """What an image says: Entrypoint, Cmd, User, Labels."""
        answer = subprocess.run([*self._buildah, "inspect", "--type=image", name], check=True, capture_output=True)
        return json.loads(answer.stdout)["Docker"]["config"]

    def run(self, name: str, *commands: list[str]) -> None:
        """Run commands one after the other in one container, as a user whom the image does not know."""
        pulled = subprocess.run([*self._buildah, "from", name], check=True, capture_output=True, text=True)
        container = pulled.stdout.strip()
        inside = [*self._buildah, "run", *self._isolated, "--hostname=localhost", f"--user={STRANGER}", container, "--"]
        try:
            for command in commands:
                _run([*inside, *command])
        finally:
            subprocess.run([*self._buildah, "rm", container], check=False, capture_output=True)


def check(variant: str, work: Path, mirror: str, torch_index: str | None) -> None:
    """Build a variant on its stand-in and run what it starts; CalledProcessError or AssertionError if a step fails."""
    images = Images(work)
    images.debian(mirror)
    base, name = f"localhost/{variant}-base", f"localhost/megagrow-{variant}"
    index = f"--extra-index-url {torch_index or 'https://download.pytorch.org/whl/cpu'}"
    images.build(base, BASES[variant].replace("{index}", index), work)
    chosen = {"TORCH_INDEX": torch_index} if torch_index and variant == "cpu" else {}
    images.build(name, (ROOT / FILES[variant]).read_text(), ROOT, BASE_IMAGE=base, **chosen, **LABELS)

    config = images.configured(name)
    labels = {key.rpartition(".")[2]: value for key, value in config["Labels"].items()}
    assert {key: labels[key.lower()] for key in LABELS} == LABELS, labels
    assert config["User"] == "10001", config["User"]
    started = [*config["Entrypoint"], *config["Cmd"]]
    writable = ["bash", "-c", 'set -e; test "$(id -u)" = 12345; touch "$HOME/x"; python -m pip check']
    if variant == "cpu":
        images.run(name, writable, [*started, *SHORT])
    else:
        images.run(name, writable, started, DATA, ALONE)
    print(f"{FILES[variant]}: built on a stand-in, and ran as user {STRANGER}")


def _run(command: list[str], text: str | None = None) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, input=text, text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variant", choices=sorted(FILES))
    parser.add_argument("--work", type=Path, default=Path("/var/tmp/megagrow-images"))
    parser.add_argument("--mirror", default="http://deb.debian.org/debian")
    parser.add_argument("--torch-index", help="where pip finds torch's CPU build; the Dockerfile's own by default")
    given = parser.parse_args()
    check(given.variant, given.work.resolve(), given.mirror, given.torch_index)
