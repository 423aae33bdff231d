"""Upscaler networks in plain torch, A1111's tiling with Pillow, and what both make of small pictures.

    pip install torch==2.11.0 numpy==2.4.6 pillow==13.0.0 safetensors==0.8.0
    python make_upscalers.py animevideov3-x4.safetensors astronaut.png [OTHER.safetensors ...]

The first file is Real-ESRGAN's `realesr-animevideov3` (body.N.weight / body.N.bias, f32), the second the public-domain
photograph in scikit-image's `skimage/data`. Writes ../upscale/. Further RRDBNet files are run on the photograph and their
results written beside them, for comparisons that are too large for a repository.
"""
import math
import pathlib
import sys
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "upscale"


def conv(x, state, name):
    weight = state[name + ".weight"].float()
    bias = state.get(name + ".bias")
    return F.conv2d(x, weight, None if bias is None else bias.float(), padding=weight.shape[-1] // 2)


def lrelu(x):
    return F.leaky_relu(x, 0.2)


class Names:
    """The three namings: role to key."""

    def __init__(self, style, blocks, ups):
        self.style, self.blocks, self.ups = style, blocks, ups

    def __call__(self, role, *at):
        if self.style == "sequence":
            return {
                "first": lambda: "model.0",
                "dense": lambda b, d, c: f"model.1.sub.{b}.RDB{d}.conv{c}.0",
                "short": lambda b, d: f"model.1.sub.{b}.RDB{d}.conv1x1",
                "trunk": lambda: f"model.1.sub.{self.blocks}",
                "up": lambda i: f"model.{3 * i}",
                "hr": lambda: f"model.{3 * self.ups + 2}",
                "last": lambda: f"model.{3 * self.ups + 4}",
            }[role](*at)
        old = self.style == "trunk"
        return {
            "first": lambda: "conv_first",
            "dense": lambda b, d, c: f"RRDB_trunk.{b}.RDB{d}.conv{c}" if old else f"body.{b}.rdb{d}.conv{c}",
            "short": lambda b, d: f"body.{b}.rdb{d}.conv1x1",
            "trunk": lambda: "trunk_conv" if old else "conv_body",
            "up": lambda i: f"upconv{i}" if old else f"conv_up{i}",
            "hr": lambda: "HRconv" if old else "conv_hr",
            "last": lambda: "conv_last",
        }[role](*at)


def rrdb(x, state, names):
    shuffle = {3: 1, 12: 2, 48: 4}[state[names("first") + ".weight"].shape[1]]
    scale = 2**names.ups // shuffle
    height, width = x.shape[2:]
    if shuffle > 1:
        x = F.pad(x, (0, -width % shuffle, 0, -height % shuffle), "reflect")
        x = F.pixel_unshuffle(x, shuffle)
    first = conv(x, state, names("first"))
    x = first
    for b in range(names.blocks):
        block = x
        for d in (1, 2, 3):
            inputs = [x]
            for c in range(1, 5):
                y = lrelu(conv(torch.cat(inputs, 1), state, names("dense", b, d, c)))
                if names("short", b, d) + ".weight" in state:
                    if c == 2:
                        y = y + conv(x, state, names("short", b, d))
                    if c == 4:
                        y = y + inputs[2]
                inputs.append(y)
            x = conv(torch.cat(inputs, 1), state, names("dense", b, d, 5)) * 0.2 + x
        x = x * 0.2 + block
    x = first + conv(x, state, names("trunk"))
    for i in range(1, names.ups + 1):
        x = lrelu(conv(F.interpolate(x, scale_factor=2, mode="nearest"), state, names("up", i)))
    x = conv(lrelu(conv(x, state, names("hr"))), state, names("last"))
    return x[:, :, : height * scale, : width * scale]


def compact(x, state):
    y, i = x, 0
    while f"body.{i + 1}.weight" in state:
        y = F.prelu(conv(y, state, f"body.{i}"), state[f"body.{i + 1}.weight"].float())
        i += 2
    y = conv(y, state, f"body.{i}")
    scale = math.isqrt(y.shape[1] // 3)
    return F.pixel_shuffle(y, scale) + F.interpolate(x, scale_factor=scale, mode="nearest")


def picture(net, image):
    """A picture through a network as A1111 does it: BGR, rounded."""
    bgr = np.ascontiguousarray(np.array(image.convert("RGB"))[:, :, ::-1].transpose(2, 0, 1)) / 255
    with torch.inference_mode():
        out = net(torch.from_numpy(bgr)[None].float())[0].clamp(0, 1).numpy()
    out = (255.0 * out.transpose(1, 2, 0)).round().astype(np.uint8)[:, :, ::-1]
    return Image.fromarray(np.ascontiguousarray(out), "RGB")


def tiled(net, image, tile, overlap):
    """The grid of the pipeline specification, chapter 10, joined with Pillow's paste."""
    width, height = image.size

    def starts(length):
        count = math.ceil((length - overlap) / (tile - overlap))
        step = (length - tile) / (count - 1) if count > 1 else 0
        return [length - tile if int(i * step) + tile >= length else int(i * step) for i in range(count)]

    rows = []
    for y in starts(height):
        pieces = []
        for x in starts(width):
            pieces.append((x, picture(net, image.crop((x, y, x + tile, y + tile)))))
        rows.append((y, pieces))
    scale = rows[0][1][0][1].width // tile
    lap, side = overlap * scale, tile * scale
    ramp = (np.arange(lap, dtype=np.float32) * 255 / lap).astype(np.uint8)
    across = Image.fromarray(np.tile(ramp, (side, 1)), "L")
    down = Image.fromarray(np.tile(ramp[:, None], (1, width * scale)), "L")
    whole = Image.new("RGB", (width * scale, height * scale))
    for y, pieces in rows:
        row = Image.new("RGB", (width * scale, side))
        for x, piece in pieces:
            if x == 0:
                row.paste(piece, (0, 0))
            else:
                row.paste(piece.crop((0, 0, lap, side)), (x * scale, 0), mask=across)
                row.paste(piece.crop((lap, 0, side, side)), (x * scale + lap, 0))
        if y == 0:
            whole.paste(row, (0, 0))
        else:
            whole.paste(row.crop((0, 0, row.width, lap)), (0, y * scale), mask=down)
            whole.paste(row.crop((0, lap, row.width, side)), (0, y * scale + lap))
    return whole


def random_rrdb(style, blocks, ups, features, growth, inputs=3, plus=False):
    names, state = Names(style, blocks, ups), OrderedDict()

    def layer(name, outputs, inputs, kernel=3, bias=True):
        bound = 1.5 / math.sqrt(inputs * kernel * kernel)
        state[name + ".weight"] = torch.empty(outputs, inputs, kernel, kernel).uniform_(-bound, bound)
        if bias:
            state[name + ".bias"] = torch.empty(outputs).uniform_(-bound, bound)

    layer(names("first"), features, inputs)
    for b in range(blocks):
        for d in (1, 2, 3):
            if plus:
                layer(names("short", b, d), growth, features, 1, False)
            for c in range(1, 6):
                layer(names("dense", b, d, c), growth if c < 5 else features, features + (c - 1) * growth)
    layer(names("trunk"), features, features)
    for i in range(1, ups + 1):
        layer(names("up", i), features, features)
    layer(names("hr"), features, features)
    layer(names("last"), 3, features)
    return names, state


def random_compact(features, layers, scale):
    state, inputs = OrderedDict(), 3
    for i in range(layers + 1):
        outputs = features if i < layers else 3 * scale * scale
        bound = 1.5 / math.sqrt(inputs * 9)
        state[f"body.{2 * i}.weight"] = torch.empty(outputs, inputs, 3, 3).uniform_(-bound, bound)
        state[f"body.{2 * i}.bias"] = torch.empty(outputs).uniform_(-bound, bound)
        if i < layers:
            state[f"body.{2 * i + 1}.weight"] = torch.empty(outputs).uniform_(0, 0.5)
        inputs = outputs
    return state


def small_networks():
    """Random networks in every naming, container and type, with their outputs."""
    torch.manual_seed(11)
    x = torch.rand(1, 3, 11, 9)
    tensors = {"input": x}

    def done(name, state, net, save):
        save(state)
        with torch.inference_mode():
            tensors[name] = net(x).contiguous()

    def pth(name, wrap):
        return lambda state: torch.save(wrap(state), OUT / f"{name}.pth")

    names, state = random_rrdb("body", 2, 2, 5, 3)
    done("body_x4", state, lambda x: rrdb(x, state, names), pth("body_x4", lambda s: {"params_ema": s}))
    save_file(state, OUT / "body_x4.safetensors")

    names2, half = random_rrdb("body", 1, 2, 5, 3, inputs=12)
    half = OrderedDict((k, v.half()) for k, v in half.items())
    done("body_x2", half, lambda x: rrdb(x, half, names2), pth("body_x2", lambda s: {"params": s}))

    names3, brain = random_rrdb("trunk", 2, 1, 4, 2)
    brain = OrderedDict((k, v.bfloat16()) for k, v in brain.items())
    done("trunk_x2", brain, lambda x: rrdb(x, brain, names3), pth("trunk_x2", lambda s: s))

    names4, sequence = random_rrdb("sequence", 1, 3, 4, 2)
    wrap = lambda s: {"state_dict": OrderedDict((k, torch.nn.Parameter(v)) for k, v in s.items()), "epoch": 3}
    done("sequence_x8", sequence, lambda x: rrdb(x, sequence, names4), pth("sequence_x8", wrap))

    names5, plus = random_rrdb("sequence", 1, 2, 4, 3, plus=True)
    # One tensor is a view of another's storage with swapped axes.
    view = OrderedDict(plus)
    key = names5("last") + ".weight"
    view[key] = plus[key].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not view[key].is_contiguous() and torch.equal(view[key], plus[key])
    done("plus_x4", view, lambda x: rrdb(x, plus, names5), pth("plus_x4", lambda s: s))

    names6, one = random_rrdb("body", 1, 2, 4, 2, inputs=48)
    done("body_x1", one, lambda x: rrdb(x, one, names6), lambda s: save_file(s, OUT / "body_x1.safetensors"))

    small = random_compact(6, 2, 2)
    done("compact_x2", small, lambda x: compact(x, small), pth("compact_x2", lambda s: {"params": s}))
    save_file(tensors, OUT / "small.safetensors")


def photograph(weights, photo, others):
    state = {k: v.half() for k, v in load_file(weights).items()}
    save_file(state, OUT / "animevideov3-x4.safetensors")
    image = Image.open(photo).convert("RGB").crop((190, 40, 262, 96))
    image.save(OUT / "photo.png", optimize=True)
    net = lambda x: compact(x, state)
    picture(net, image).save(OUT / "photo_whole.png", optimize=True)
    tiled(net, image, 32, 8).save(OUT / "photo_tiles.png", optimize=True)
    padded = image.crop((0, 0, 40, 30))
    tiled(net, padded, 48, 8).save(OUT / "photo_padded.png", optimize=True)
    for path in map(pathlib.Path, others):
        state = load_file(path)
        blocks = len({k.split(".")[1] for k in state if k.startswith("body.")})
        names = Names("body", blocks, 2)
        picture(lambda x: rrdb(x, state, names), image).save(path.with_suffix(".png").name)


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    small_networks()
    photograph(sys.argv[1], sys.argv[2], sys.argv[3:])
