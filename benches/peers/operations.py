"""The operations of `sdgen bench --operations` in PyTorch, one JSON object an operation: the median of a second's runs.

    python operations.py [--dtype bf16] [--threads 2]
"""

import argparse
import json
import statistics
import time

SECONDS = 1.0


def measure(dtype, threads):
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def repeat(name, run):
        run()
        seconds, begin = [], time.perf_counter()
        while time.perf_counter() - begin < SECONDS or len(seconds) < 5:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"part": name, "seconds": statistics.median(seconds)}), flush=True)

    def wave(*shape):
        return torch.randn(*shape).to(kind)

    def gated(layer, x):
        value, gate = layer(x).chunk(2, -1)
        return value * F.gelu(gate)

    with torch.inference_mode():
        for c, side in [(320, 64), (640, 32), (1280, 16)]:
            conv = torch.nn.Conv2d(c, c, 3, padding=1, bias=False).to(kind, memory_format=torch.channels_last)
            norm = torch.nn.GroupNorm(32, c).to(kind)
            x = wave(2, c, side, side).to(memory_format=torch.channels_last)
            repeat(f"convolution 3x3 {c} channels {side}x{side}", lambda: conv(x))
            repeat(f"group norm + SiLU {c} channels {side}x{side}", lambda: F.silu(norm(x)))
        shapes = [(1024, 640, 5120, True), (256, 1280, 10240, True), (1024, 2560, 640, False)]
        for tokens, inputs, outputs, gate in shapes + [(256, 5120, 1280, False), (256, 1280, 3840, False)]:
            layer, x = torch.nn.Linear(inputs, outputs, bias=False).to(kind), wave(2, tokens, inputs)
            name = f"linear {tokens}x{inputs}x{outputs}" + (" + GEGLU" if gate else "")
            repeat(name, (lambda: gated(layer, x)) if gate else (lambda: layer(x)))
        for tokens, heads in [(4096, 10), (1024, 10), (256, 20)]:
            def split(x):
                return x.unflatten(-1, (heads, 64)).transpose(1, 2)

            q, k, v = (split(t) for t in wave(2, tokens, 3 * 64 * heads).chunk(3, -1))
            repeat(f"self-attention {tokens} tokens, {heads} heads", lambda: F.scaled_dot_product_attention(q, k, v))
            k, v = (split(t) for t in wave(2, 77, 2 * 64 * heads).chunk(2, -1))
            repeat(f"cross-attention {tokens} tokens, {heads} heads", lambda: F.scaled_dot_product_attention(q, k, v))
        norm, x = torch.nn.LayerNorm(1280).to(kind), wave(2, 256, 1280)
        repeat("layer norm 512x1280", lambda: norm(x))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    arguments.add_argument("--threads", type=int, default=2)
    a = arguments.parse_args()
    measure(a.dtype, a.threads)


if __name__ == "__main__":
    main()
