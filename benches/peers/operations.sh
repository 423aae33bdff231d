#!/usr/bin/env bash
# Runs single operations in sdgen and PyTorch in turns, in f32 and bf16, and prints medians and ratios.
#
# Environment: ROUNDS (3); THREADS (2); PYTHON (python3); SDGEN, the program (built for release if not given).
set -euo pipefail
cd "$(dirname "$0")/../.."

threads=${THREADS:-2} python=${PYTHON:-python3}
if [[ -z ${SDGEN:-} ]]; then
    cargo build --release --locked
    SDGEN=${CARGO_TARGET_DIR:-target}/release/sdgen
fi
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
for dtype in f32 bf16; do
    for _ in $(seq "${ROUNDS:-3}"); do
        "$SDGEN" bench --operations --dtype "$dtype" --threads "$threads" --json >>"$out/sdgen-$dtype"
        "$python" benches/peers/operations.py --dtype "$dtype" --threads "$threads" >>"$out/pytorch-$dtype"
    done
    "$python" benches/peers/operations.py --dtype "$dtype" "$out/sdgen-$dtype" "$out/pytorch-$dtype"
done
