"""Copies whole-job goldens with only what the tests compare: the final latents (pictures lie beside them as PNG).

    pip install numpy safetensors zstandard
    python prune_jobs.py DIR_OF_MAKE_E2E OUT_DIR
"""
import sys
from pathlib import Path

import zstandard
from safetensors.numpy import load, save

source, out = Path(sys.argv[1]), Path(sys.argv[2])
for path in sorted([*source.glob("*.safetensors"), *source.glob("*.safetensors.zst")]):
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    kept = {k: t for k, t in load(data).items() if k in ("latents", "zeroed.latents")}
    packed = zstandard.ZstdCompressor(level=19).compress(save(kept, {"format": "pt"}))
    (out / path.name.removesuffix(".zst")).with_suffix(".safetensors.zst").write_bytes(packed)
