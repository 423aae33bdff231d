"""Runs the sections of `kernels/gpu.sh`, each under a time limit, and writes `gpu.json`, `gpu.md` and `gpu.log` to a folder.

Invariants: a section that fails or runs out of time is a line of the table and a non-zero exit at the end, not the end of the others; what
a section printed before it was cut short counts; all sections together end within the budget.
"""
import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import report

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET = 530  # seconds for all sections
CLOCKS = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,ecc.mode.current"


class Runner:
    """The sections so far, which are written out after each, and what is left of the time."""

    def __init__(self, out, budget, dry_run):
        self.out, self.end, self.log = out, time.monotonic() + budget, open(out / "gpu.log", "w", errors="replace")
        self.result = dict(machine=machine(), dry_run=dry_run, sections=[])

    def left(self):
        return self.end - time.monotonic()

    def run(self, name, command, limit, env=None, needs=None):
        """Adds a section: rows are the JSON objects among the lines of the command's output."""
        limit = min(limit, self.left())
        if needs:
            # A dry run tells what is missing; a run on a card needs all of it.
            return self.add(name, self.result["dry_run"], 0.0, f"not run: {needs}", [])
        if limit < 5:
            return self.add(name, False, 0.0, "not run: no time left", [])
        command, begin = [str(word) for word in command], time.monotonic()
        print(f"# {name}: {' '.join(command)}", file=self.log, flush=True)
        out, err, code = self.finish(command, limit, env)
        for text in (out, err):
            self.log.write(text[-200_000:] + "\n")
        seconds, rows = time.monotonic() - begin, parse(out)
        note = "" if code == 0 else f"cut short after {limit:.0f} s" if code is None else f"exit {code}: {last_line(err or out)}"
        return self.add(name, code == 0, seconds, note, rows)

    def finish(self, command, limit, env):
        """Output, errors and exit code; no code if it was stopped at the limit, with all it started."""
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True, errors="replace", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        except OSError as error:
            return "", str(error), 127
        try:
            out, err = child.communicate(timeout=limit)
            return out, err, child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, err = child.communicate()
            return out, err, None

    def add(self, name, ok, seconds, note, rows):
        section = dict(name=name, ok=ok, seconds=round(seconds, 1), note=note, rows=rows)
        self.result["sections"].append(section)
        print(f"{report.verdict(section):7} {seconds:6.1f} s  {name}  {note}", flush=True)
        self.write()
        return section

    def write(self):
        (self.out / "gpu.json").write_text(json.dumps(self.result, indent=1))
        text = report.markdown(self.result)
        (self.out / "gpu.md").write_text(text)
        return text


def parse(text):
    rows = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                pass
    return rows


def last_line(text):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def machine():
    """The card and what surrounds it; whatever cannot be asked is missing."""
    facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S %Z"), "cores": os.cpu_count()}
    if shutil.which("nvidia-smi"):
        ask = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=False).stdout.splitlines()
        facts |= dict(zip(CLOCKS.split(","), (part.strip() for part in (said or [""])[0].split(","))))
    try:
        import torch

        facts |= {"torch": torch.__version__, "cudnn of torch": torch.backends.cudnn.version()}
    except ImportError:
        pass
    return facts


def on_card(runner, sdgen, scratch):
    """The sections on a GPU, what matters most first."""
    python, peer = sys.executable, HERE / "peer.py"
    card, size = ["--device", "cuda"], ["-W", 1024, "-H", 1024]
    verify = [sdgen, "bench", "--json", *card, "--verify"]
    everything = ["all", "--golden", ROOT / "tests/golden"]
    own = {"SDGEN_CUDA_KERNELS": "own"}
    for dtype in ("f32", "f16", "bf16"):
        runner.run(f"verify {dtype}", [*verify, *everything, "--dtype", dtype], 45)
    for dtype in ("f16", "bf16"):
        runner.run(f"verify {dtype}, own kernels", [*verify, "operations", "--dtype", dtype], 25, own)
    runner.run("card", [python, peer, "card"], 40)

    model = scratch / "synthetic.safetensors"
    room = shutil.disk_usage(scratch).free > 8_000_000_000
    full = None if room else f"{scratch} has less than 8 GB free"
    write = runner.run("write a full-size checkpoint", [sdgen, "bench", "--synthetic", "sdxl", "--write", model], 60, needs=full)
    absent = None if write["ok"] else "no checkpoint"
    for dtype in ("f16", "bf16"):
        bench = [sdgen, "bench", "--json", *card, "--dtype", dtype]
        runner.run(f"jobs {dtype}", [*bench, "-m", model, *size, "--job", "30,20"], 70, needs=absent)
        runner.run(f"parts {dtype}", [*bench, "-m", model, *size, "--steps", 10], 50, needs=absent)
        runner.run(f"operations {dtype}", [*bench, "--operations"], 50)
    runner.run("PyTorch eager", [python, peer, "eager"], 60)

    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", 9, *verify, "quick", "--dtype", "bf16"]
        runner.run(f"compute-sanitizer {check}, own kernels", command, 60, own)
    # Compiling takes minutes: a cheap mode first, then all that is left.
    runner.run("PyTorch compiled, reduce-overhead", [python, peer, "compiled", "--mode", "reduce-overhead"], min(90, runner.left() / 3))
    runner.run("PyTorch compiled, max-autotune", [python, peer, "compiled"], runner.left())


def on_cpu(runner, sdgen, scratch):
    """What can be tried without a GPU, at tiny size."""
    python, peer = sys.executable, HERE / "peer.py"
    probe = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    torch = None if probe.returncode == 0 else "this Python has no torch"
    runner.run("weights of the peer", [python, peer, "count"], 120, needs=torch)
    tiny = ["--tiny", "--device", "cpu", "--runs", 2]
    runner.run("card", [python, peer, "card", *tiny], 120, needs=torch)
    runner.run("PyTorch eager", [python, peer, "eager", *tiny], 240, needs=torch)
    absent = None if sdgen else "no binary (`SDGEN`, `.gpu/sdgen.xz` or target/)"
    bench = [sdgen, "bench", "--json", "--data-dir", scratch / "data"]
    cpu = ["--device", "cpu", "--dtype", "bf16"]
    everything = ["all", "--golden", ROOT / "tests/golden"]
    runner.run("verify bf16", [*bench, "--verify", *everything, *cpu], 240, needs=absent)
    runner.run("jobs bf16", [*bench, "-W", 128, "-H", 128, "--job", "2", *cpu], 240, needs=absent)
    runner.run("parts bf16", [*bench, "-W", 128, "-H", 128, "--steps", 2, *cpu], 240, needs=absent)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sdgen", default="", help="the program")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments.out, 1800 if arguments.dry_run else BUDGET, arguments.dry_run)
    with tempfile.TemporaryDirectory(prefix="sdgen-") as scratch:
        sections = on_cpu if arguments.dry_run else on_card
        sections(runner, arguments.sdgen, pathlib.Path(scratch))
    runner.result["machine"]["clocks.sm after"] = machine().get("clocks.sm")
    print(runner.write())
    return 0 if all(section["ok"] for section in runner.result["sections"]) else 1


if __name__ == "__main__":
    sys.exit(main())
