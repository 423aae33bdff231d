#!/usr/bin/env bash
# Installs the peers of `run.py` without root: PyTorch with diffusers, and stable-diffusion.cpp, which its Python package carries as
# source (four CPU minutes to build). Does nothing where that has happened already.
#
#   benches/peers/install.sh [FOLDER]      default: target/peers
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=${1:-target/peers}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python=$folder/python/bin/python
version=0.4.7

[[ -x $python ]] || python3 -m venv "$folder/python"
"$python" -m pip install --quiet --disable-pip-version-check -r benches/peers/requirements.txt
if [[ ! -x $folder/sd-cli ]]; then
    source=stable_diffusion_cpp_python-$version
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation \
        --no-binary stable-diffusion-cpp-python --dest "$folder" "stable-diffusion-cpp-python==$version"
    tar -xzf "$folder/$source.tar.gz" -C "$folder"
    # GGML_LLAMAFILE: its faster matrix products.
    PATH=$folder/python/bin:$PATH cmake -G Ninja -S "$folder/$source/vendor/stable-diffusion.cpp" -B "$folder/build" \
        -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DSD_WEBM=OFF -DSD_WEBP=OFF -DSD_SERVER_BUILD_FRONTEND=OFF
    PATH=$folder/python/bin:$PATH cmake --build "$folder/build" --target sd-cli
    cp "$folder/build/bin/sd-cli" "$folder/sd-cli"
    rm -r "$folder/build" "${folder:?}/$source"
fi
"$folder/sd-cli" --version
"$python" -c 'import torch, diffusers; print("torch", torch.__version__, "diffusers", diffusers.__version__)'
