#!/usr/bin/env bash
# Compiles every kernel for every target and prints a table of registers, shared memory and spills; fails on a spill.
#     kernels/check.sh NVCC [ARCHITECTURE...]
set -euo pipefail
nvcc=$(realpath "${1:?usage: kernels/check.sh NVCC [ARCHITECTURE...]}")
cd "$(dirname "$0")"
shift
targets=("$@")
[[ ${#targets[@]} != 0 ]] || targets=(80 86 89 90a 100 120)
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

# One file for one target: lines of "kernel target registers spilled-bytes static-shared".
compile() {
    local file=$1 target=$2
    "$nvcc" -std=c++17 -O3 -cubin -gencode "arch=compute_$target,code=sm_$target" -Xptxas -v -Werror all-warnings "$file.cu" -o "$work/$file.$target.cubin" \
        >"$work/$file.$target.log" 2>&1 || {
        cat "$work/$file.$target.log" >&2
        return 1
    }
    awk -v target="$target" '
        /Compiling entry function/ { split($0, part, "\047"); kernel = part[2] }
        /bytes spill stores/ { spilled = $5 + $9; stack = $1 }
        /Used [0-9]+ registers/ {
            shared = match($0, /[0-9]+ bytes smem/) ? substr($0, RSTART, RLENGTH) + 0 : 0
            match($0, /Used [0-9]+/)
            print kernel, target, substr($0, RSTART + 5, RLENGTH - 5), spilled, shared
        }' "$work/$file.$target.log" >"$work/$file.$target.txt"
}

for source in *.cu; do
    for target in "${targets[@]}"; do
        echo "${source%.cu} $target"
    done
done >"$work/jobs"
export -f compile
export nvcc work
xargs -P "$(nproc)" -n 2 bash -c 'compile "$0" "$1"' <"$work/jobs"

awk -v targets="${targets[*]}" '
    { registers[$1 " " $2] = $3; if ($4 > 0) spilled[$1] = spilled[$1] " sm_" $2 ":" $4; shared[$1] = $5; if (!($1 in seen)) { seen[$1] = 1; order[++count] = $1 } }
    END {
        n = split(targets, target, " ")
        head = "| kernel |"; line = "|---|"
        for (i = 1; i <= n; ++i) { head = head " sm_" target[i] " |"; line = line "---|" }
        print head " static shared | spills |"; print line "---|---|"
        for (k = 1; k <= count; ++k) {
            row = "| `" order[k] "` |"
            for (i = 1; i <= n; ++i) row = row " " registers[order[k] " " target[i]] " |"
            print row " " shared[order[k]] " | " (order[k] in spilled ? spilled[order[k]] : "0") " |"
            bad += order[k] in spilled
        }
        if (bad) { print bad " kernels spill registers" > "/dev/stderr"; exit 1 }
    }' $(find "$work" -name '*.txt' | sort)
