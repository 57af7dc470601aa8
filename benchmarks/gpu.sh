#!/usr/bin/env bash
# Measures cv_jax on one NVIDIA GPU, in about 12 minutes with the installation.
#
#   bash benchmarks/gpu.sh [OUT]            # results in OUT, runs/gpu by default
#   bash benchmarks/gpu.sh --small [OUT]    # a try at tiny sizes on the CPU, without installing
#
# Each section has a time limit and writes OUT/SECTION.json while it measures. A section that is cut
# at its limit, or that fails, leaves what it has, and the next one starts. The end prints a table
# and writes OUT/summary.json. benchmarks/gpu.py says what the sections are.
#
# CIFAR-10 is read from TFDS_DATA_DIR, else from ~/tensorflow_datasets, and downloaded if missing.
#
# Exit codes: 0 done, also if a section was cut; 1 a section failed; 2 there is no GPU, or the
# installation failed; 130 or 143 stopped by Ctrl-C or SIGTERM.
set -uo pipefail

VENV=${VENV:-${VIRTUAL_ENV:-}}            # virtual environment to install into; else OUT/venv
SECTIONS=${SECTIONS:-data digits record record_batched step simclr}
LIMIT=${LIMIT:-}                          # seconds for each section, in place of these:
declare -A limits=([data]=80 [digits]=60 [record]=140 [record_batched]=100 [step]=180 [simclr]=90)
GRACE=20                                  # seconds to save in after a limit

fail() { echo "gpu.sh: $1" >&2; exit 2; }
small=
[ "${1:-}" != --small ] || { small=--small; shift; }
[ $# -le 1 ] && [[ ${1:-} != -* ]] || fail "the arguments are [--small] [OUT], not $*"
for name in $SECTIONS; do
  [ -n "${limits[$name]:-}" ] || fail "SECTIONS: there is no section $name: ${!limits[*]}"
done
mkdir -p "${1:-runs/gpu}" && out=$(cd "${1:-runs/gpu}" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

python=${VENV:+$VENV/bin/}python3
if [ -n "$small" ]; then
  export JAX_PLATFORMS=cpu
else
  # One GPU: the first of those that may be used.
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
  export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is no Python of 3.11 or newer: set VENV to a virtual environment that has one."
  if [ -z "$VENV" ]; then
    VENV=$out/venv
    "$python" -m venv "$VENV" || fail "$python cannot make a virtual environment in $VENV."
    python=$VENV/bin/python3
  fi
  echo "installs JAX for CUDA 13 and PyTorch in $VENV"
  "$python" -m pip install --quiet -r requirements-bench.txt "jax[cuda13]" ||
    "$python" -m pip install --quiet -r requirements.txt "jax[cuda13]" || # without PyTorch
    fail "the installation failed, see pip's message above."
  echo "installed after $SECONDS s"
fi

running=
# shellcheck disable=SC2329 # the traps call it
stop() {
  if [ -n "$running" ]; then
    kill "$running" && wait "$running"
  fi
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

"$python" -m benchmarks.gpu check --out="$out" $small || exit 2
ended=()
code=0
for name in $SECTIONS; do
  limit=${LIMIT:-${limits[$name]}}
  echo "== $name, at most $limit s"
  rm -f "$out/$name.json"
  began=$SECONDS
  # In the foreground of its own: only the section gets the signal, once, and stops its programs.
  timeout --foreground --preserve-status --kill-after="$GRACE" "$limit" \
    "$python" -m benchmarks.gpu "$name" --out="$out" $small &
  running=$!
  if wait "$running"; then
    ended+=("$name=done")
  elif [ $((SECONDS - began)) -ge "$limit" ]; then
    ended+=("$name=cut")
    echo "gpu.sh: $name was cut after $limit s"
  else
    ended+=("$name=failed")
    echo "gpu.sh: $name failed, see its message above" >&2
    code=1
  fi
  running=
done
"$python" -m benchmarks.gpu summary --out="$out" $small --ended "${ended[@]}" || code=1
echo "written $out/summary.json after $SECONDS s"
exit "$code"
