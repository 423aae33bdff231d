#!/usr/bin/env bash
# What can be said about the CUDA code on a machine without a GPU: the Rust code under the feature passes its lints, every kernel of
# ours compiles for every target with the real nvcc, none spills. Prints registers and shared memory of each kernel.
#
#   kernels/check.sh [FOLDER OF THE TOOLKIT]
set -euo pipefail
cd "$(dirname "$0")/.."
unset RUSTFLAGS

toolkit=${1:-target/cuda}
kernels/toolkit.sh "$toolkit"
CUDA_HOME=$(cd "$toolkit/home" && pwd)
export CUDA_HOME CUDA_PATH=$CUDA_HOME SDGEN_NVCC=$CUDA_HOME/bin/nvcc NVCC=$PWD/kernels/check/nvcc

began=$SECONDS
# A folder of its own, so that no later build finds candle's empty kernels in its cache.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-check
# clippy is a program of its own: settings before its name would not reach it.
cargo clippy --config kernels/cuda.toml --locked --features cuda --lib --bins -- -D warnings
echo "check: lints passed in $((SECONDS - began)) s"

report=$(find "$CARGO_TARGET_DIR" -path '*/build/sdgen-*/out/resources.tsv' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)
column -t -s $'\t' "$report"
if awk -F'\t' 'NR > 1 && $6 != 0 { found = 1 } END { exit !found }' "$report"; then
    echo "check: a kernel spills registers" >&2
    exit 1
fi
