"""Copies the tiny checkpoint with the token rows that no golden prompt uses set to zero, zstd-compressed (16.7 -> 7 MB).

    pip install numpy safetensors tokenizers zstandard
    python prune_tokens.py GOLDEN_DIR OUT_DIR
"""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

import planes

golden, out = Path(sys.argv[1]), Path(sys.argv[2])
bpe = Tokenizer(BPE.from_file(str(golden / "clip/vocab.json"), str(golden / "clip/merges.txt"), end_of_word_suffix="</w>"))
bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(words), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

texts = ["RAW photo, portrait", "brackets ( ) [ ] : , BREAK and 0 1 2 3 4 5 6 7 8 9", "a red apple, painted style"]
for case in json.loads((golden / "e2e/e2e.json").read_text())["cases"]:
    texts += [case["prompt"], case["negative"]]
ids = {0, 49406, 49407}
for text in texts:
    ids.update(bpe.encode(text, add_special_tokens=False).ids)
for case in json.loads((golden / "tokenize.json").read_text())["cases"]:
    for value in case.values():
        if isinstance(value, list):
            ids.update(i for i in value if isinstance(i, int))
for key, tensor in load_file(golden / "text.safetensors").items():
    if "ids" in key and tensor.dtype == np.int64 and "time" not in key:
        ids.update(tensor.flatten().tolist())

source = golden / "tiny_sdxl.safetensors"
tensors = load_file(source)
with safe_open(source, "np") as f:
    metadata = f.metadata()
unused = np.setdiff1d(np.arange(49408), np.array(sorted(ids)))
for key in tensors:
    if key.endswith("token_embedding.weight"):
        tensors[key] = tensors[key].copy()
        tensors[key][unused] = 0
packed = planes.pack(save(tensors, metadata))
(out / "tiny_sdxl.safetensors.planes.zst").write_bytes(packed)
print(len(ids), "token rows kept,", len(packed), "bytes")
