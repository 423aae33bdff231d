"""SDXL in plain PyTorch with random weights: the peer of `sdgen bench`.

    python pytorch.py --width 512 --height 512 --steps 2 [--scale tiny] [--threads 2] [--dtype bf16]

Same graph and shapes as src/weights/synthetic.rs (`--scale sdxl`, 13.9 GB of f32 weights) or as the embedded demo model
(`--scale tiny`): both text towers, UNet, VAE decoder. f32 or bf16, channels_last, inference mode, fused attention. As in sdgen the keys
and values of the text are computed once. Prints one JSON object a part, as `sdgen bench --json` does; operations are those of
all products, a multiply-add counts two.
"""
import argparse
import json
import math
import resource
import time

import torch
import torch.nn.functional as F
from torch import nn

SCALES = {
    "sdxl": dict(
        widths=(320, 640, 1280), depths=(0, 2, 10), middle=10, text_l=(768, 12, 64), text_g=(1280, 32, 64), vocabulary=49408,
        vae=(128, 256, 512, 512), vae_blocks=2,
    ),
    "tiny": dict(
        widths=(64, 128, 128), depths=(0, 1, 1), middle=1, text_l=(64, 3, 64), text_g=(64, 3, 64), vocabulary=49408,
        vae=(32, 32, 64, 128), vae_blocks=1,
    ),
}
OPERATIONS = 0


def count(multiply_adds):
    global OPERATIONS
    OPERATIONS += 2 * multiply_adds


class Linear(nn.Linear):
    def forward(self, x):
        count(x.numel() * self.out_features)
        return super().forward(x)


class Conv(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        count(y.numel() * self.in_channels * self.kernel_size[0] ** 2)
        return y


def attend(q, k, v, heads, causal=False):
    """[batch, tokens, channels] each; heads side by side."""
    def split(t):
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    # A causal mask is not taken off, as sdgen does not.
    count(2 * q.numel() * k.shape[1])
    return F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=causal).transpose(1, 2).flatten(2)


class TextLayer(nn.Module):
    def __init__(self, width, head, activation):
        super().__init__()
        self.heads, self.activation = width // head, activation
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.fc1, self.fc2 = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(attend(q, k, v, self.heads, causal=True))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class TextTower(nn.Module):
    def __init__(self, width, layers, head, activation, vocabulary, pooled):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(77, width)
        self.layers = nn.ModuleList(TextLayer(width, head, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = Linear(width, width, bias=False) if pooled else None

    def forward(self, ids):
        x = self.token(ids) + self.position.weight
        for layer in self.layers[:-1]:
            x = layer(x)
        if self.projection is None:
            return x, None
        ends = self.layers[-1](x)[torch.arange(len(ids)), ids.argmax(-1)]
        return x, self.projection(self.norm(ends))


class ResBlock(nn.Module):
    """`inputs` to `outputs` channels; with a time embedding of width `embedding` if that is not 0."""

    def __init__(self, inputs, outputs, embedding, eps):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps), Conv(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps), Conv(outputs, outputs, 3, padding=1)
        self.time = Linear(embedding, outputs) if embedding else None
        self.skip = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

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
        self.qkv, self.out1 = Linear(width, 3 * width, bias=False), Linear(width, width)
        self.q, self.kv, self.out2 = Linear(width, width, bias=False), Linear(context, 2 * width, bias=False), Linear(width, width)
        self.up, self.down = Linear(width, 8 * width), Linear(4 * width, width)

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
        self.proj_in, self.proj_out = Linear(width, width), Linear(width, width)
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
        self.conv = Conv(width, width, 3, padding=1)

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
        self.time = nn.Sequential(Linear(widths[0], embedding), nn.SiLU(), Linear(embedding, embedding))
        self.label = nn.Sequential(Linear(vector, embedding), nn.SiLU(), Linear(embedding, embedding))
        stage = lambda inputs, width, depth: [ResBlock(inputs, width, embedding, 1e-5)] + (
            [Transformer(width, context, depth)] if depth else []
        )
        self.conv_in = Conv(4, widths[0], 3, padding=1)
        self.inputs, skips, c = nn.ModuleList(), [widths[0]], widths[0]
        for level, (width, depth) in enumerate(zip(widths, depths)):
            for _ in range(2):
                self.inputs.append(nn.ModuleList(stage(c, width, depth)))
                c = width
                skips.append(c)
            if level + 1 < len(widths):
                self.inputs.append(nn.ModuleList([Conv(c, c, 3, stride=2, padding=1)]))
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
        self.norm_out, self.conv_out = nn.GroupNorm(32, c, 1e-5), Conv(c, 4, 3, padding=1)

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
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)).chunk(3, -1)
        return x + self.out(attend(q, k, v, 1)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    def __init__(self, widths, blocks):
        super().__init__()
        c = widths[-1]
        parts = [Conv(4, 4, 1), Conv(4, c, 3, padding=1), ResBlock(c, c, 0, 1e-6), VaeAttention(c), ResBlock(c, c, 0, 1e-6)]
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                parts.append(ResBlock(c, widths[level], 0, 1e-6))
                c = widths[level]
            if level:
                parts.append(Up(c))
        parts += [nn.GroupNorm(32, c, 1e-6), nn.SiLU(), Conv(c, 3, 3, padding=1)]
        self.parts = nn.Sequential(*parts)

    def forward(self, z):
        return self.parts(z)


def materialize(module, device="cpu"):
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


def timed(name, work):
    global OPERATIONS
    OPERATIONS = 0
    start = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - start
    gflop = OPERATIONS / 1e9
    part = {"part": name, "seconds": seconds, "gflop": gflop, "gflop_per_s": gflop / seconds}
    print(json.dumps(part), flush=True)
    return value


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--height", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--scale", choices=SCALES, default="sdxl")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    torch.set_default_dtype({"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype])
    shape = SCALES[a.scale]

    def text(size, activation, pooled):
        return TextTower(*size, activation, shape["vocabulary"], pooled)

    def build():
        with torch.device("meta"):
            context, pooled = shape["text_l"][0] + shape["text_g"][0], shape["text_g"][0]
            parts = [
                text(shape["text_l"], lambda x: x * torch.sigmoid(1.702 * x), pooled=False),
                text(shape["text_g"], F.gelu, pooled=True),
                Unet(shape["widths"], shape["depths"], shape["middle"], context, pooled + 6 * 256),
                Decoder(shape["vae"], shape["vae_blocks"]),
            ]
        return [materialize(part) for part in parts]

    with torch.inference_mode():
        l, g, unet, vae = timed("build", build)
        prompt = [49406] + [300 + i for i in range(1, 13)] + [49407] * 64
        # Starts the thread pool and the libraries, which is not what is measured.
        F.conv2d(torch.ones(1, 64, 32, 32), torch.ones(64, 64, 3, 3)), torch.ones(512, 512) @ torch.ones(512, 512)
        ids = torch.tensor([prompt, [49406] + [49407] * 76])
        (hidden_l, _), (hidden_g, pooled) = timed("text", lambda: (l(ids), g(ids)))
        context = torch.cat([hidden_l, hidden_g], -1)
        vector = torch.cat([pooled, torch.zeros(2, 6 * 256)], -1)
        conditioning = timed("context keys and values", lambda: unet.condition(context, vector))
        x = torch.randn(2, 4, a.height // 8, a.width // 8).to(memory_format=torch.channels_last)
        for step in range(1, a.steps + 1):
            t = torch.full((2,), 999.0 * (1.0 - step / (a.steps + 1)))
            eps = timed(f"step {step} (batch of 2)", lambda: unet(x, t, conditioning))
            x = x - eps * 0.1
        picture = timed("decode", lambda: vae(x[:1]))
        assert picture.shape == (1, 3, a.height, a.width) and picture.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"peak_rss_gb": peak, "torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
