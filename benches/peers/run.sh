#!/usr/bin/env bash
# Runs `sdgen bench` and PyTorch on the same shapes in turns on an otherwise idle machine and prints their ratio.
#
#   python3 -m venv .venv && .venv/bin/pip install -r benches/peers/requirements.txt
#   PYTHON=.venv/bin/python benches/peers/run.sh
#
# Environment: SCALE=sdxl (default; needs 16 GB of memory) or tiny (the embedded demo model); WIDTH and HEIGHT (512); STEPS (2);
# DTYPE=f32 (default) or bf16; ROUNDS (2); THREADS (2); PYTHON (python3); SDGEN, the program (built for release if not given).
set -euo pipefail
cd "$(dirname "$0")/../.."

scale=${SCALE:-sdxl} dtype=${DTYPE:-f32} threads=${THREADS:-2} python=${PYTHON:-python3}
size=(--width "${WIDTH:-512}" --height "${HEIGHT:-512}" --steps "${STEPS:-2}")
if [[ -z ${SDGEN:-} ]]; then
    cargo build --release --locked
    SDGEN=${CARGO_TARGET_DIR:-target}/release/sdgen
fi
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
model=(--synthetic sdxl)
if [[ $scale == tiny ]]; then
    # An empty data directory: the demo model is all there is.
    model=(--data-dir "$out/data")
fi

ours=() theirs=()
for round in $(seq "${ROUNDS:-2}"); do
    echo "round $round: sdgen" >&2
    RAYON_NUM_THREADS=$threads "$SDGEN" bench "${model[@]}" "${size[@]}" --dtype "$dtype" --json >"$out/sdgen-$round.jsonl"
    echo "round $round: PyTorch" >&2
    "$python" benches/peers/pytorch.py --scale "$scale" --threads "$threads" --dtype "$dtype" "${size[@]}" >"$out/pytorch-$round.jsonl"
    ours+=("$out/sdgen-$round.jsonl")
    theirs+=("$out/pytorch-$round.jsonl")
done
"$python" benches/peers/ratio.py "$(IFS=,; echo "${ours[*]}")" "$(IFS=,; echo "${theirs[*]}")"
