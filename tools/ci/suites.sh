#!/usr/bin/env bash
# What `make test` runs: every suite, whatever fails before it, then a line for each. Exits with 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

BIN=${BIN:-.venv/bin}
# A file of tests often waits for a single rank, or for a deadline, while another could compute: two at once, whatever
# the number of cores, take a fifth less time.
PARALLEL=(-n 2 --dist loadfile)
summary=()
status=0
trap 'exit 130' INT TERM

suite() { # NAME COMMAND...
  local name=$1 start=$SECONDS result=passed
  shift
  printf '\n==== %s: %s\n' "$name" "$*"
  "$@" || { result=failed && status=1; }
  summary+=("$(printf '%-12s %s %6d s' "$name" "$result" $((SECONDS - start)))")
}

suite system make --no-print-directory system
suite lint make --no-print-directory lint
suite house "$BIN/python" -m pytest "${PARALLEL[@]}" tests/house
suite unit "$BIN/python" -m pytest "${PARALLEL[@]}" tests/unit
suite distributed "$BIN/python" -m pytest "${PARALLEL[@]}" --timeout 900 tests/distributed
suite huggingface "$BIN/python" -m pytest tests/huggingface
suite slurm "$BIN/python" -m pytest tests/slurm

printf '\n==== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
