"""SDXL's UNet and VAE decoder in plain PyTorch on a card, and what the card itself can do: the peers of `sdgen bench`.

    peer.py count                 proves on the meta device that the models have SDXL's number of weights
    peer.py card                  peak of matrix products, bandwidth of a copy
    peer.py eager                 bf16, channels last, fused attention, launch by launch
    peer.py compiled [--mode M]   the same by torch.compile; M = max-autotune (default), reduce-overhead, ...
    --tiny --device cpu           a few channels, for machines without a card

A step is a batch of two (classifier-free guidance) at 1024x1024 with random weights; keys and values of the text are computed once, as in
sdgen. A total is text to pixels without text encoders and PNG: steps of Euler's rule and one decode. Prints one JSON object a line as soon
as it is known, so that a run that is cut short keeps what it has. Times are medians between events of the card, after warm-up; inputs
are normal noise, never zeros.
"""
import argparse
import json
import statistics
import sys
import time

import torch

import sdxl

UNET, DECODER = 2_567_463_684, 49_490_199


def build(tiny):
    """UNet, decoder and the widths of context and vector, on the meta device."""
    shape = sdxl.SCALES["tiny" if tiny else "sdxl"]
    context, vector = shape["context"], shape["pooled"] + 6 * 256
    with torch.device("meta"):
        unet = sdxl.Unet(shape["widths"], shape["depths"], shape["middle"], context, vector)
        return unet, sdxl.Decoder(shape["vae"], shape["vae_blocks"]), context, vector


def say(**fields):
    print(json.dumps(fields), flush=True)


class Clock:
    """Median seconds of a piece of work between two rests of the device."""

    def __init__(self, device):
        self.card = device.startswith("cuda")

    def rest(self):
        if self.card:
            torch.cuda.synchronize()

    def once(self, work):
        self.rest()
        if self.card:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            value = work()
            end.record()
            self.rest()
            return begin.elapsed_time(end) / 1e3, value
        start = time.perf_counter()
        value = work()
        return time.perf_counter() - start, value

    def median(self, work, runs, warm_up=3):
        for _ in range(warm_up):
            work()
        return statistics.median(self.once(work)[0] for _ in range(runs))

    def peak(self):
        return torch.cuda.max_memory_allocated() if self.card else None


def card(arguments):
    """Peak of a product of large matrices and bandwidth of a large copy."""
    clock, device = Clock(arguments.device), arguments.device
    side, runs = (256, 3) if arguments.tiny else (8192, 20)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = clock.median(lambda: a @ b, runs)
        say(peer="card", part=f"matrix product {side}^3 {str(dtype)[6:]}", seconds=seconds, tflop_per_s=2 * side**3 / seconds / 1e12)
    count = 1 << (18 if arguments.tiny else 29)
    source, target = torch.randn(count // 2, device=device), torch.empty(count // 2, device=device)
    seconds = clock.median(lambda: target.copy_(source), runs)
    say(peer="card", part="copy", seconds=seconds, bytes_per_s=2 * 4 * (count // 2) / seconds)


def jobs(arguments, name, wrap):
    """UNet step, decode and whole jobs; `wrap` is what makes a module faster."""
    device, clock = arguments.device, Clock(arguments.device)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    unet, decoder, context, vector = build(arguments.tiny)
    unet, decoder = sdxl.materialize(unet, device), sdxl.materialize(decoder, device)
    side = 8 if arguments.tiny else 128

    def noise(*shape):
        return torch.randn(*shape, device=device)

    conditioning = unet.condition(noise(2, 77, context), noise(2, vector))
    last = dict(memory_format=torch.channels_last)
    x = noise(2, 4, side, side).to(**last)
    clock.rest()
    begin = time.perf_counter()
    fast = wrap(unet)
    # A tensor, since a number that changes would be compiled again.
    fast(x, torch.full((2,), 999.0, device=device), conditioning)
    clock.rest()
    say(peer=name, part="UNet, first step", seconds=time.perf_counter() - begin)
    times = iter(range(10**6))

    def step(x):
        t = torch.full((2,), 999.0 - next(times) % 900, device=device)
        return fast(x, t, conditioning)

    say(peer=name, part="step", seconds=clock.median(lambda: step(x), arguments.runs), peak_bytes=clock.peak())
    z = noise(1, 4, side, side).to(**last)
    begin = time.perf_counter()
    fast_decoder = wrap(decoder)
    fast_decoder(z)
    clock.rest()
    say(peer=name, part="decode, first", seconds=time.perf_counter() - begin)
    say(peer=name, part="decode", seconds=clock.median(lambda: fast_decoder(z), arguments.runs), peak_bytes=clock.peak())

    def whole(steps):
        latents = x[:1].clone()
        for _ in range(steps):
            uncond, cond = step(latents.expand(2, -1, -1, -1).contiguous(**last)).chunk(2)
            latents = latents - (uncond + 7.0 * (cond - uncond)) * (0.1 / steps)
        return (fast_decoder(latents) * 127.5 + 127.5).clamp(0, 255).to(torch.uint8).cpu()

    for steps in (2,) if arguments.tiny else (30, 20):
        wall = []
        for _ in range(1 if arguments.tiny else 4):
            clock.rest()
            begin = time.perf_counter()
            whole(steps)
            wall.append(time.perf_counter() - begin)
        seconds = statistics.median(wall[1:] or wall)
        say(peer=name, part=f"total of {steps} steps", seconds=seconds, peak_bytes=clock.peak())


def count():
    unet, decoder, _, _ = build(tiny=False)
    have = [sum(p.numel() for p in module.parameters()) for module in (unet, decoder)]
    say(peer="count", unet=have[0], decoder=have[1], ok=have == [UNET, DECODER])
    return 0 if have == [UNET, DECODER] else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["count", "card", "eager", "compiled"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--mode", default="max-autotune")
    arguments = parser.parse_args()
    if arguments.what == "count":
        return count()
    # no_grad and not inference_mode: the compiler does not take tensors made in the latter.
    with torch.no_grad():
        if arguments.what == "card":
            card(arguments)
        elif arguments.what == "eager":
            jobs(arguments, "eager", lambda module: module)
        else:
            # The results of a recording live until its next run, and Euler's rule reads them before that.
            jobs(arguments, f"compiled, {arguments.mode}", lambda module: torch.compile(module, mode=arguments.mode, fullgraph=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
