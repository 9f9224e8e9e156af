#!/usr/bin/env bash
# Installs what the tests need and pip cannot bring: a Slurm with munge, and shellcheck. Does nothing where all is there.
set -euo pipefail

PATH=$PATH:/usr/sbin
declare -A package=([munged]=munge [slurmctld]=slurm-wlm [slurmd]=slurm-wlm [sbatch]=slurm-wlm [shellcheck]=shellcheck)

missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi

if ! command -v apt-get >/dev/null; then
  echo "make: tests need ${missing[*]}, and there is no apt-get here: install them by hand" >&2
  exit 2
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "make: tests need ${missing[*]}: as root, apt-get install ${missing[*]}" >&2
    exit 2
  fi
  as_root=(sudo)
fi
echo "make: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
