#!/usr/bin/env bash
# The first minutes on a GPU as numbers: does every operation compute what the CPU computes, how fast are jobs, steps and operations, and
# how fast is PyTorch on the same card in the same run. Ends within nine minutes; needs neither cargo nor a network.
#
#   OUT=results kernels/gpu.sh            a card, CUDA 13, Python with torch, and the binary: SDGEN or .gpu/sdgen.xz
#   kernels/gpu.sh --dry-run              no card: looks for all of that and runs what can run on a CPU, at tiny size
#
# Writes gpu.md (tables), gpu.json and gpu.log to OUT (default: .gpu/out). Exit 1 if a section failed. Environment: SDGEN, the program
# (else .gpu/sdgen.xz is unpacked); PYTHON (python3); TMPDIR, where 7 GB are written for a while.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3} out=${OUT:-.gpu/out} dry=${1:-}
if [[ -n $dry && $dry != --dry-run ]]; then
    echo "usage: kernels/gpu.sh [--dry-run]" >&2
    exit 2
fi
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

# The libraries that the binary opens lie in Python's packages, each in a folder of its own.
library_path() {
    "$python" - <<'PY'
import pathlib, site, sysconfig
wanted = ["libcudnn.so.9", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libnvrtc.so.13"]
roots = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *site.getsitepackages(), site.getusersitepackages()}
folders = []
for name in wanted:
    found = [path.parent for root in sorted(roots) for path in pathlib.Path(root).glob(f"nvidia/*/lib/{name}")]
    found += [path.parent for path in pathlib.Path("/usr/local/cuda/lib64").glob(name)]
    print(f"{name}: {found[0] if found else 'not found'}", file=__import__("sys").stderr)
    folders += [str(folder) for folder in found[:1] if str(folder) not in folders]
print(":".join(folders))
PY
}

say_tools() {
    local tool
    for tool in nvidia-smi nvcc compute-sanitizer ncu nsys "$python"; do
        echo "$tool: $(command -v "$tool" || echo 'not found')" >&2
    done
}

wrong=0
if [[ $dry == --dry-run ]]; then
    for script in kernels/*.sh; do
        bash -n "$script" || wrong=1
    done
    for script in kernels/gpu/*.py; do
        "$python" -c 'import ast, sys; ast.parse(open(sys.argv[1]).read())' "$script" || wrong=1
    done
    "$python" kernels/gpu/report.py --test || wrong=1
    for file in tests/golden/{tiny_sdxl.safetensors.planes,text.safetensors,unet.safetensors,vae.safetensors}.zst; do
        [[ -f $file ]] || { echo "$file: not found" >&2; wrong=1; }
    done
fi
say_tools
libraries=$(library_path)
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

sdgen=${SDGEN:-}
if [[ -z $sdgen && -f .gpu/sdgen.xz ]]; then
    sdgen=$scratch/sdgen
    "$python" kernels/gpu/pack.py unpack .gpu/sdgen.xz "$sdgen" || exit 1
fi
if [[ -z $sdgen && $dry == --dry-run ]]; then
    for found in "${CARGO_TARGET_DIR:-target}"/{release,debug}/sdgen; do
        [[ -z $sdgen && -x $found ]] && sdgen=$found
    done
elif [[ -z $sdgen ]]; then
    echo "gpu: neither SDGEN nor .gpu/sdgen.xz" >&2
    exit 1
fi
echo "sdgen: ${sdgen:-not found} ${sdgen:+$("$sdgen" --version)}" >&2

"$python" kernels/gpu/measure.py ${dry:+"$dry"} --sdgen "$sdgen" --out "$out" || wrong=1
exit "$wrong"
