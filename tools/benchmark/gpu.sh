#!/usr/bin/env bash
# What one bare GPU can check of megagrow, in under ten minutes: see tools/benchmark/gpu.py.
#
#     tools/benchmark/gpu.sh DIRECTORY [OPTIONS OF gpu.py]
#
# Needs a python3 with torch for this GPU, megatron-core and megagrow's other packages; nothing is downloaded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
exec "${PYTHON:-python3}" -m tools.benchmark.gpu "$@"
