#!/usr/bin/env python3
"""Carries a binary of sdgen in few bytes: `pack` leaves out the demo model, which the checkout holds beside it, and compresses the
rest; `unpack` puts both together again and checks the digest. Standard library only, since a bare GPU machine has no more.

    kernels/gpu/pack.py pack BINARY PACKED
    kernels/gpu/pack.py unpack PACKED BINARY
"""

import hashlib
import json
import lzma
import pathlib
import sys

MODEL = pathlib.Path(__file__).resolve().parents[2] / "models/demo/sdgen-demo.safetensors.zst"


def pack(binary: pathlib.Path, packed: pathlib.Path) -> None:
    whole, model = binary.read_bytes(), MODEL.read_bytes()
    at = whole.find(model)
    if at < 0:
        sys.exit(f"pack: {binary} does not hold {MODEL.name} as it lies here; build it again")
    rest = whole[:at] + whole[at + len(model) :]
    head = json.dumps({"at": at, "sha256": hashlib.sha256(whole).hexdigest()}).encode()
    packed.parent.mkdir(parents=True, exist_ok=True)
    packed.write_bytes(head + b"\n" + lzma.compress(rest, preset=6))
    print(f"pack: {len(whole)} bytes in {packed.stat().st_size}: {packed}")


def unpack(packed: pathlib.Path, binary: pathlib.Path) -> None:
    head, rest = packed.read_bytes().split(b"\n", 1)
    head, rest = json.loads(head), lzma.decompress(rest)
    whole = rest[: head["at"]] + MODEL.read_bytes() + rest[head["at"] :]
    if hashlib.sha256(whole).hexdigest() != head["sha256"]:
        sys.exit(f"unpack: {packed} was packed with another {MODEL.name}; build and pack it again")
    binary.write_bytes(whole)
    binary.chmod(0o755)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pack", binary, packed]:
            pack(pathlib.Path(binary), pathlib.Path(packed))
        case ["unpack", packed, binary]:
            unpack(pathlib.Path(packed), pathlib.Path(binary))
        case _:
            sys.exit(__doc__)
