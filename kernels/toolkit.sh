#!/usr/bin/env bash
# The CUDA compiler without NVIDIA's installer: nvcc and what it needs from the Python registry, as a folder that serves as
# CUDA_HOME. No root, no driver, no GPU. Does nothing where that has happened already.
#
#   kernels/toolkit.sh [FOLDER]      FOLDER/home is the CUDA_HOME; default `target/cuda`
#
# The binary opens the driver and the libraries at run time (see kernels/cuda.toml), so the libraries that a linker asks for
# are empty stubs here; none of them is needed to build.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-target/cuda}
# 13.0 runs on driver 580 and newer.
packages=(
    nvidia-cuda-nvcc==13.0.88
    nvidia-nvvm==13.0.88
    nvidia-cuda-crt==13.0.88
    nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85
    nvidia-curand==10.4.0.35
)

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
if [[ $(cat "$folder/installed" 2>/dev/null) == "${packages[*]}" ]] && "$folder/home/bin/nvcc" --version >/dev/null 2>&1; then
    echo "toolkit: there already: $folder/home"
    exit 0
fi

began=$SECONDS
rm -rf "$folder/python" "$folder/home"
python3 -m venv "$folder/python" || {
    echo "toolkit: python3 with venv is needed (Debian: apt-get install python3-venv)" >&2
    exit 1
}
"$folder/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "${packages[@]}"
unpacked=$(echo "$folder"/python/lib/python3*/site-packages/nvidia/cu13)

mkdir -p "$folder/home/lib/stubs"
for part in bin include nvvm; do
    ln -s "$unpacked/$part" "$folder/home/$part"
done
ln -s "$folder/home/lib" "$folder/home/lib64"
ln -s "$unpacked/lib/libcudart_static.a" "$folder/home/lib/libcudart_static.a"
ln -s "$unpacked/lib/libcudadevrt.a" "$folder/home/lib/libcudadevrt.a"
# candle-kernels asks for `cudart` by its short name: the archive under that name makes it static.
ln -s "$unpacked/lib/libcudart_static.a" "$folder/home/lib/libcudart.a"
for library in cuda nvrtc curand cublas cublasLt cudnn; do
    echo "/* a linker script without content */" >"$folder/home/lib/stubs/lib$library.so"
done

"$folder/home/bin/nvcc" --version | tail -2
echo "${packages[*]}" >"$folder/installed"
echo "toolkit: installed in $((SECONDS - began)) s, $(du -shL "$folder/home" | cut -f1): $folder/home"
