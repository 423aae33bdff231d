"""Textual inversions in every form that A1111 reads, for `tests/embeddings.rs`: needs torch, numpy and Pillow.

    python make_embeddings.py ../embeddings

Row r of each holds (r + 1) / 4 in CLIP ViT-L's 768 places and (r + 1) / 8 in bigG's 1280, so that the test knows what to expect.
"""

import base64
import collections
import json
import pathlib
import struct
import sys
import zipfile
import zlib

import numpy as np
import torch
from PIL import Image, PngImagePlugin

ROWS = 2
out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)


def table(width_l=768, width_g=1280, rows=ROWS):
    parts = [torch.full((width_l,), 1 / 4), torch.full((width_g,), 1 / 8)]
    return torch.stack([torch.cat(parts) * (r + 1) for r in range(rows)]).half()


class Encoder(json.JSONEncoder):
    def default(self, value):
        return {"TORCHTENSOR": value.tolist()}


def carried(name, both=None):
    both = table() if both is None else both
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": both}, "name": name, "step": 10}


def save(file, value):
    torch.save(value, out / file)


# A1111's own training, the first inversions with their module, both tables, one table, a concept of diffusers.
save("plain.pt", carried("another name"))
parameters = torch.nn.ParameterDict()
parameters._parameters = collections.OrderedDict({"*": torch.nn.Parameter(table())})
save("module.pt", {"string_to_token": {"*": 265}, "string_to_param": parameters})
both = table()
save("pair.pt", {"clip_l": both[:, :768].clone(), "clip_g": both[:, 768:].clone()})
save("single.bin", {"emb_params": both})
save("concept.bin", {"<concept>": table(rows=1)[0].clone()})
# For other models, and a program.
save("sd1.pt", carried("sd1", table(768, 0)))
save("odd.bin", {"<odd>": table(100, 0)})
save("program.pt", {"string_to_param": {"*": print}})


# In the text of a PNG.
def small(width, height):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([64 + x % 128, 64 + y % 128, np.full_like(x, 200)], 2).astype(np.uint8)


text = PngImagePlugin.PngInfo()
text.add_text("sd-ti-embedding", base64.b64encode(json.dumps(carried("texted"), cls=Encoder).encode()).decode())
Image.fromarray(small(16, 16)).save(out / "text.png", pnginfo=text)
text = PngImagePlugin.PngInfo()
text.add_text("sd-ti-embedding", "bm90IGpzb24=")
Image.fromarray(small(16, 16)).save(out / "damaged.png", pnginfo=text)


# In the low bits left and right of a picture, each beside a black column.
def hidden(block):
    seed, noise = 0, []
    for _ in range(block.size):
        seed = (1664525 * seed + 1013904223) % 2**32
        noise.append(seed % 255 & 15)
    low = block ^ np.array(noise, np.uint8).reshape(block.shape)
    return low | 0x50


def pixels(name, height, cut=None):
    packed = np.frombuffer(zlib.compress(json.dumps(carried(name), cls=Encoder).encode(), 9)[:cut], np.uint8)
    size = -(-packed.size // (3 * height)) * 3 * height
    packed = np.resize(packed, size).reshape(height, -1, 3)
    black = np.zeros((height, 1, 3), np.uint8)
    row = [hidden(packed & 15), black, small(24, height), black, hidden(packed >> 4)]
    framed = np.pad(np.concatenate(row, 1), ((2, 3), (1, 0), (0, 0)))
    return Image.fromarray(framed)


pixels("painted", 16).save(out / "pixels.png")
pixels("webp", 16).save(out / "pixels.webp", lossless=True, exact=True)
pixels("short", 16, 60).save(out / "short.png")
Image.fromarray(small(32, 16)).save(out / "preview.png")
pixels("not read", 16).save(out / "pair.preview.png")


# The same file as a checkpoint of more than 4 GiB would be: every size and place in zip64's fields.
def large(source, target):
    body, directory, full = b"", b"", 0xFFFFFFFF
    with zipfile.ZipFile(out / source) as entries:
        for info in entries.infolist():
            name, data, place = info.filename.encode(), entries.read(info), len(body)
            body += struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, info.CRC, len(data), len(data), len(name), 0) + name + data
            extra = struct.pack("<2H3Q", 1, 24, len(data), len(data), place)
            sizes = (info.CRC, full, full, len(name), len(extra), 0, 0, 0, 0, full)
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes) + name + extra
        count = len(entries.infolist())
    at = len(body) + len(directory)
    body += directory
    body += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at - len(directory))
    body += struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    body += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, full, full, 0)
    (out / target).write_bytes(body)


large("plain.pt", "large.pt")
