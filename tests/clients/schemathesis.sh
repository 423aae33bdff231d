#!/usr/bin/env bash
# Holds a server to its own OpenAPI document with schemathesis 4.32.5 and prints how many cases were run.
#   SDGEN=target/debug/sdgen SCHEMATHESIS=.venv/bin/schemathesis tests/clients/schemathesis.sh [EXAMPLES]
#
# Left out: streams that do not end (`/events`), and two checks that the contract contradicts: A1111's clients send numbers as
# text and flags as numbers, so what breaks the written types is often accepted, and what fits them may name no checkpoint.
set -euo pipefail
examples=${1:-25}
dir=$(mktemp -d)
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true; rm -r "$dir"' EXIT
cat >"$dir/sdgen.toml" <<'TOML'
[limits]
max_side = 64
max_steps = 2
max_batch_size = 1
max_batch_count = 1
max_megapixels = 1
max_prompt_kib = 1
TOML
"${SDGEN:-sdgen}" serve --port 0 --data-dir "$dir" 2>"$dir/log" &
server=$!
address=
while [[ -z $address ]]; do
    kill -0 "$server" && sleep 0.1
    address=$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$dir/log")
done
code=0
"${SCHEMATHESIS:-schemathesis}" run "$address/openapi.json" --url "$address" --max-examples "$examples" --seed 1 \
    --exclude-path-regex 'events$' --request-timeout 60 --no-color \
    --phases examples,coverage,fuzzing \
    --exclude-checks negative_data_rejection,positive_data_acceptance \
    >"$dir/report" 2>&1 || code=$?
cat "$dir/report"
kill -0 "$server" || { echo "the server died:" >&2; tail -50 "$dir/log" >&2; exit 1; }
exit "$code"
