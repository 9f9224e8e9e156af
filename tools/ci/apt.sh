#!/usr/bin/env bash
# What `make system` runs: installs what the tests need and pip does not have, and says what that is.
set -euo pipefail

PATH=$PATH:/usr/sbin
declare -A package=([munged]=munge [slurmctld]=slurm-wlm [slurmd]=slurm-wlm [sbatch]=slurm-wlm [shellcheck]=shellcheck)

missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "make system: munge, shellcheck and slurm-wlm are installed; nothing to do"
  exit 0
fi
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get >/dev/null; then
  echo "make system: tests need ${missing[*]}, and there is no apt-get here: install them by hand" >&2
  exit 2
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "make system: tests need ${missing[*]}: as root, apt-get install ${missing[*]}" >&2
    exit 2
  fi
  as_root=(sudo)
fi
echo "make system: apt-get install ${missing[*]} (a Slurm for tests/slurm; shellcheck for scripts)"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "make system: installed ${missing[*]}"
