#!/usr/bin/env python3
"""sdgen beside PyTorch and stable-diffusion.cpp on the same machine, checkpoint and shapes, in turns; prints Markdown tables.

    benches/peers/install.sh && target/peers/python/bin/python benches/peers/run.py [SECTION...]

Sections: operations, demo (the embedded model, 20 steps), sdxl (full size, 512x512; 7 GB of disk and 16 GB of memory),
scaling (threads and picture sizes). Without any: all of them. A ratio above 1 means that sdgen is faster. Every figure is a median
over rounds, between which the programs alternate. The machine should do nothing else; its load is printed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "target/peers"
SDXL = PEERS / "sdxl.safetensors"
SECTIONS = ["operations", "demo", "sdxl", "scaling"]
DTYPES = ["f32", "bf16"]


class Runs:
    """Seconds of each part over all rounds of one program, and the highest memory."""

    def __init__(self):
        self.seconds, self.rates, self.memory = {}, {}, 0.0

    def add(self, lines):
        for line in lines.splitlines():
            row = json.loads(line)
            self.memory = max(self.memory, row.get("peak_rss_gb", 0.0))
            if "part" in row:
                # Steps are alike, but the first one finds cold caches and builds what later ones reuse.
                if row["part"].startswith("step 1 "):
                    continue
                part = re.sub(r"^step \d+ ", "step ", row["part"])
                self.seconds.setdefault(part, []).append(row["seconds"])
                if row.get("gflop"):
                    self.rates.setdefault(part, []).append(row["gflop"] / row["seconds"])
        return self

    def median(self, part):
        return statistics.median(self.seconds[part]) if part in self.seconds else None

    def rate(self, part):
        return f"{statistics.median(self.rates[part]):.0f}" if part in self.rates else ""


def run(*command, **variables):
    command = [str(word) for word in command]
    print("run:", " ".join(command), file=sys.stderr)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}).stdout


def milliseconds(seconds):
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def ratio(ours, theirs):
    return "" if not ours or not theirs else f"{theirs / ours:.2f}"


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def operations(a):
    for dtype in a.dtypes:
        ours, torch = Runs(), Runs()
        for _ in range(a.rounds):
            ours.add(run(a.sdgen, "bench", "--operations", "--json", "--dtype", dtype, "--threads", a.threads))
            torch.add(run(sys.executable, ROOT / "benches/peers/operations.py", "--dtype", dtype, "--threads", a.threads))
        print(f"## Operations, {dtype}, milliseconds\n")
        table(
            ["operation", "sdgen", "GFLOP/s", "PyTorch", "ratio"],
            [
                [part, milliseconds(ours.median(part)), ours.rate(part), milliseconds(torch.median(part)),
                 ratio(ours.median(part), torch.median(part))]
                for part in ours.seconds
            ],
        )  # fmt: skip


def pytorch(a, checkpoint, scale, dtype, size):
    script = ROOT / "benches/peers/pytorch.py"
    return run(sys.executable, script, "--checkpoint", checkpoint, "--scale", scale, "--dtype", dtype, "--threads", a.threads, *size)


def stable_diffusion_cpp(a, dtype, width, height):
    """Its log's times as JSON lines. Two steps; it runs the halves of the guidance one after the other."""
    steps = 2
    with tempfile.TemporaryDirectory() as folder:
        command = [
            PEERS / "sd-cli", "-m", SDXL, "--type", dtype, "-p", "a b c d e f g h i j k l", "--cfg-scale", 7, "--steps", steps, "-W", width,
            "-H", height, "-t", a.threads, "--sampling-method", "euler", "--fa", "--seed", 1, "-v", "-o", f"{folder}/picture.png",
        ]  # fmt: skip
        log = logged(command)
    found = {
        "text": r"get_learned_condition completed, taking ([\d.]+)s",
        "sampling": r"sampling completed, taking ([\d.]+)s",
        "decode": r"decode_first_stage completed, taking ([\d.]+)s",
    }
    seconds = {part: float(re.search(pattern, log).group(1)) for part, pattern in found.items()}
    seconds["step (batch of 2)"] = seconds.pop("sampling") / steps
    lines = [json.dumps({"part": part, "seconds": value}) for part, value in seconds.items()]
    lines.append(json.dumps({"peak_rss_gb": int(re.search(r"peak kilobytes (\d+)", log).group(1)) * 1024 / 1e9}))
    return "\n".join(lines)


def logged(command):
    """Both outputs of a command, and its peak memory as the kernel counted it."""
    command = [str(word) for word in command]
    print("run:", " ".join(command), file=sys.stderr)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        text = log.read()
        if status != 0:
            sys.exit(f"{command[0]} failed:\n{text[-2000:]}")
        return f"{text}\npeak kilobytes {usage.ru_maxrss}\n"


def demo(a):
    packed = ROOT / "models/demo/sdgen-demo.safetensors.zst"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo.safetensors"
        subprocess.run(["zstd", "-dqf", packed, "-o", model], check=True)
        size = ["--width", 128, "--height", 128, "--steps", 21]
        for dtype in a.dtypes:
            ours, torch = Runs(), Runs()
            for _ in range(a.rounds):
                # An empty data directory: the demo model is all there is.
                bench = [a.sdgen, "bench", "--data-dir", f"{folder}/data", "--json", "--dtype", dtype, "--threads", a.threads]
                ours.add(run(*bench, *size))
                torch.add(pytorch(a, model, "demo", dtype, size))
            print(f"## Demo model, 128x128, {dtype}, milliseconds\n")
            rows = [
                [part, milliseconds(ours.median(part)), milliseconds(torch.median(part)), ratio(ours.median(part), torch.median(part))]
                for part in ["text", "step (batch of 2)", "decode"]
            ]
            whole = [20 * side.median("step (batch of 2)") + side.median("decode") + side.median("text") for side in (ours, torch)]
            rows.append(["text, 20 steps and decode", *map(milliseconds, whole), ratio(*whole)])
            table(["part", "sdgen", "PyTorch", "ratio"], rows)


def sdxl(a):
    if not SDXL.exists():
        run(a.sdgen, "bench", "--synthetic", "sdxl", "--write", SDXL)
    size = ["--width", 512, "--height", 512, "--steps", 3]
    for dtype in a.dtypes:
        ours, torch, cpp = Runs(), Runs(), Runs()
        for _ in range(a.rounds):
            bench = [a.sdgen, "bench", "-m", SDXL, "--json", "--dtype", dtype, "--threads", a.threads]
            ours.add(run(*bench, *size))
            torch.add(pytorch(a, SDXL, "sdxl", dtype, size))
        # One round: it takes minutes, and a few percent do not matter there.
        cpp.add(stable_diffusion_cpp(a, dtype, 512, 512))
        print(f"## SDXL, 512x512, {dtype}, seconds\n")
        rows = []
        for part in ["load text encoders", "load unet", "load vae", "text", "context keys and values", "step (batch of 2)", "decode"]:
            values = [side.median(part) for side in (ours, torch, cpp)]
            shown = ["" if value is None else f"{value:.2f}" for value in values]
            rows.append([part, shown[0], ours.rate(part), shown[1], ratio(*values[:2]), shown[2], ratio(values[0], values[2])])
        memory = [f"{side.memory:.2f} GB" for side in (ours, torch, cpp)]
        rows.append(["peak memory", memory[0], "", memory[1], "", memory[2], ""])
        table(["part", "sdgen", "GFLOP/s", "PyTorch", "ratio", "stable-diffusion.cpp", "ratio"], rows)


def scaling(a):
    if not SDXL.exists():
        run(a.sdgen, "bench", "--synthetic", "sdxl", "--write", SDXL)
    rows = []
    cases = [(1, 256), (2, 256), (1, 512), (2, 512), (2, 768), (2, 1024)]
    for threads, side in cases:
        size = ["--width", side, "--height", side, "--steps", 2]
        ours = Runs().add(run(a.sdgen, "bench", "-m", SDXL, "--json", "--dtype", "bf16", "--threads", threads, *size))
        step, decode = ours.median("step (batch of 2)"), ours.median("decode")
        rows.append([f"{side}x{side}", str(threads), f"{step:.2f}", ours.rate("step (batch of 2)"), f"{decode:.2f}", f"{ours.memory:.2f} GB"])
    print("## SDXL, bf16: threads and sizes, seconds\n")
    table(["size", "threads", "step (batch of 2)", "GFLOP/s", "decode", "peak memory"], rows)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("sections", nargs="*", metavar="SECTION", default=SECTIONS)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtypes", type=lambda text: text.split(","), default=DTYPES)
    arguments.add_argument("--sdgen", default=ROOT / "target/release/sdgen", help="the program; built for release if it is not there")
    a = arguments.parse_args()
    if unknown := set(a.sections) - set(SECTIONS):
        arguments.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not Path(a.sdgen).exists():
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {a.threads} threads, {a.rounds} rounds, load before {os.getloadavg()[0]:.2f}\n")
    for section in a.sections:
        {"operations": operations, "demo": demo, "sdxl": sdxl, "scaling": scaling}[section](a)


if __name__ == "__main__":
    main()
