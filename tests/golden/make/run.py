"""python run.py --out DIR [--only model,tokens,...]  (see README.md)"""
import argparse
import importlib
import json
import pathlib
import time

import common

STAGES = ["model", "tokens", "text", "unet", "vae", "rng", "brownian", "sigmas", "samplers", "lora", "e2e", "extra"]

if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--variant", default="public", choices=list(common.VARIANTS))
    ap.add_argument("--out", required=True)
    ap.add_argument("--only", default="")
    ap.add_argument("--clip", default="", help="folder with vocab.json/merges.txt (default: DIR/clip, written if missing)")
    a = ap.parse_args()
    out = pathlib.Path(a.out)
    v = common.VARIANTS[a.variant]
    v["name"] = a.variant
    v["clip_dir"] = pathlib.Path(a.clip) if a.clip else out / "clip"
    rep = out / "checks.json"
    allrep = json.loads(rep.read_text()) if rep.exists() else {}
    for st in (a.only.split(",") if a.only else STAGES):
        t0 = time.time()
        print(f"== {st}", flush=True)
        common.REPORT = {}
        importlib.import_module(f"make_{st}").main(v, out)
        allrep[st] = dict(common.REPORT)
        common.save_json(rep, allrep)
        print(f"   {time.time() - t0:.1f}s", flush=True)
