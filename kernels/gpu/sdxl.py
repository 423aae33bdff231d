"""SDXL's UNet and VAE decoder in plain PyTorch, as modules that `torch.compile` takes whole: the models of `peer.py`.

Invariants: parameters are those of the published checkpoints, with query, key and value of a layer side by side in one product; the keys
and values of the text are computed once for all steps, as sdgen does; activations are channels last, so no layer copies to change between
pictures and tokens. Follows the architecture of Stability AI's `generative-models`.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

SCALES = {
    "sdxl": dict(widths=(320, 640, 1280), depths=(0, 2, 10), middle=10, context=2048, pooled=1280, vae=(128, 256, 512, 512), vae_blocks=2),
    "tiny": dict(widths=(64, 128, 128), depths=(0, 1, 1), middle=1, context=128, pooled=64, vae=(32, 32, 64, 128), vae_blocks=1),
}


def attend(q, k, v, heads):
    """[batch, tokens, channels] each; heads side by side."""

    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


class ResBlock(nn.Module):
    """`inputs` to `outputs` channels; with a time embedding of width `embedding` if that is not 0."""

    def __init__(self, inputs, outputs, embedding, eps):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time = nn.Linear(embedding, outputs) if embedding else None
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time is not None:
            h = h + self.time(emb)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Block(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out1 = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q, self.kv, self.out2 = nn.Linear(width, width, bias=False), nn.Linear(context, 2 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x, kv):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out1(attend(q, k, v, self.heads))
        k, v = kv.chunk(2, -1)
        x = x + self.out2(attend(self.q(self.norm2(x)), k, v, self.heads))
        value, gate = self.up(self.norm3(x)).chunk(2, -1)
        return x + self.down(value * F.gelu(gate))


class Transformer(nn.Module):
    def __init__(self, width, context, depth):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, context) for _ in range(depth))

    def forward(self, x, kvs):
        # Free of copies: the activations are channels last.
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in self.blocks:
            h = block(h, next(kvs))
        return x + self.proj_out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Up(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def sinusoidal(t, width):
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(torch.get_default_dtype())


class Unet(nn.Module):
    def __init__(self, widths, depths, middle, context, vector):
        super().__init__()
        self.width, embedding = widths[0], 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Sequential(nn.Linear(vector, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        stage = lambda inputs, width, depth: [ResBlock(inputs, width, embedding, 1e-5)] + (
            [Transformer(width, context, depth)] if depth else []
        )
        self.conv_in = nn.Conv2d(4, widths[0], 3, padding=1)
        self.inputs, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, (width, depth) in enumerate(zip(widths, depths)):
            for _ in range(2):
                self.inputs.append(nn.ModuleList(stage(c, width, depth)))
                c = width
                skips.append(c)
            if level + 1 < len(widths):
                self.inputs.append(nn.ModuleList([nn.Conv2d(c, c, 3, stride=2, padding=1)]))
                skips.append(c)
        self.middle = nn.ModuleList(stage(c, c, middle) + stage(c, c, 0))
        self.outputs = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(3):
                parts = stage(c + skips.pop(), widths[level], depths[level])
                c = widths[level]
                if i == 2 and level:
                    parts.append(Up(c))
                self.outputs.append(nn.ModuleList(parts))
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, 1e-5), nn.Conv2d(c, 4, 3, padding=1)

    def condition(self, context, vector):
        """What all steps share: keys and values of every block, in the order of use, and the label's embedding."""
        return [module.kv(context) for module in self.modules() if isinstance(module, Block)], self.label(vector)

    def forward(self, x, t, conditioning):
        kvs, label = conditioning
        kvs, emb = iter(kvs), F.silu(self.time(sinusoidal(t, self.width)) + label)

        def run(parts, h):
            for part in parts:
                if isinstance(part, ResBlock):
                    h = part(h, emb)
                else:
                    h = part(h, kvs) if isinstance(part, Transformer) else part(h)
            return h

        h = self.conv_in(x)
        skips = [h]
        for parts in self.inputs:
            h = run(parts, h)
            skips.append(h)
        h = run(self.middle, h)
        for parts in self.outputs:
            h = run(parts, torch.cat([h, skips.pop()], 1))
        return self.conv_out(F.silu(self.norm_out(h)))


class VaeAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)).chunk(3, -1)
        return x + self.out(attend(q, k, v, 1)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    def __init__(self, widths, blocks):
        super().__init__()
        c = widths[-1]
        parts = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, c, 3, padding=1), ResBlock(c, c, 0, 1e-6), VaeAttention(c), ResBlock(c, c, 0, 1e-6)]
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                parts.append(ResBlock(c, widths[level], 0, 1e-6))
                c = widths[level]
            if level:
                parts.append(Up(c))
        parts += [nn.GroupNorm(32, c, 1e-6), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1)]
        self.parts = nn.Sequential(*parts)

    def forward(self, z):
        return self.parts(z)


def materialize(module, device):
    """Gives a module on the meta device its weights: variance 1/fan-in, norms 1, biases 0; channels last."""
    module.to_empty(device=device)
    for name, p in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.dim() == 1:
            nn.init.ones_(p)
        else:
            bound = math.sqrt(3 / p[0].numel())
            nn.init.uniform_(p, -bound, bound)
    return module.eval().to(torch.get_default_dtype(), memory_format=torch.channels_last)
