#!/usr/bin/env bash
# The binary for GPU and CPU: toolkit, build, and what came out of it. Takes about ten minutes on two cores the first time, most
# of them for candle's kernels.
#
#   kernels/build.sh [ARGUMENTS OF cargo build]
set -euo pipefail
cd "$(dirname "$0")/.."
unset RUSTFLAGS

kernels/toolkit.sh
began=$SECONDS
CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)} \
    cargo --config kernels/cuda.toml build --release --locked --features cuda --bin sdgen "$@"
binary=${CARGO_TARGET_DIR:-target}/x86_64-unknown-linux-gnu/release/sdgen
echo "built in $((SECONDS - began)) s: $binary, $(du -m --apparent-size "$binary" | cut -f1) MiB"
ldd "$binary"
if ldd "$binary" | grep -E 'libcuda|libcublas|libcudnn|libcurand|libnvrtc|not found'; then
    echo "build: the binary must find these at run time, not at its start" >&2
    exit 1
fi

# The proof that it starts: with a driver on the card, without one on the CPU, and it says which.
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
"$binary" prompt "a red apple" --data-dir "$folder/data" --output "$folder/apple.png"
echo "starts and makes a picture of $(stat -c %s "$folder/apple.png") bytes"

# What a bare GPU machine is handed: see kernels/gpu.sh.
kernels/gpu/pack.py pack "$binary" .gpu/sdgen.xz
