#!/usr/bin/env bash
# What can be said about the CUDA code on a machine without a GPU: the Rust code under the feature passes its lints, and every kernel of
# ours compiles with the real nvcc for every target, without spilling registers.
#
#   kernels/lint.sh [FOLDER OF THE TOOLKIT]
set -euo pipefail
cd "$(dirname "$0")/.."
unset RUSTFLAGS

toolkit=${1:-target/cuda}
kernels/toolkit.sh "$toolkit"
CUDA_HOME=$(cd "$toolkit/home" && pwd)
began=$SECONDS
kernels/check.sh "$CUDA_HOME/bin/nvcc"
echo "lint: kernels compiled in $((SECONDS - began)) s"

began=$SECONDS
# A folder of its own, so that no later build finds empty kernels in its cache. clippy is a program of its own: settings before its name
# would not reach it.
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/cuda-lint CUDA_PATH=$CUDA_HOME CUDA_HOME=$CUDA_HOME NVCC=$PWD/kernels/empty_nvcc \
    cargo clippy --config kernels/cuda.toml --locked --features cuda --lib --bins -- -D warnings
echo "lint: clippy passed in $((SECONDS - began)) s"
