"""python modes.py --clip DIR [--only NAME,...]: writes ../modes (see README.md)."""
import argparse
import json

import torch
from PIL import Image
from safetensors.torch import save_file

import mode_cases
import mode_hires
import mode_image
import mode_refiner
from mode_parts import BASE, HERE, Model, Texts, png, tiny_checkpoint
from tinymodel import P_UNET

OUT = HERE / "modes"


def inpainting_checkpoint():
    """The tiny checkpoint with five further input channels."""
    sd = tiny_checkpoint()
    key = P_UNET + "input_blocks.0.0.weight"
    more = torch.randn(sd[key].shape[0], 5, 3, 3, generator=torch.Generator().manual_seed(9)) * 0.15
    sd[key] = torch.cat([sd[key], more.half()], 1)
    return sd, {key + ".more": more.half()}


class Models:
    """Checkpoints by the name that a case gives."""

    def __init__(self):
        self.loaded = {}

    def get(self, name):
        if name not in self.loaded:
            self.loaded[name] = self.load(name)
        return self.loaded[name]

    def load(self, name):
        if name == "refiner":
            return mode_refiner.RefinerModel(OUT)
        if name == "inpainting":
            sd, more = inpainting_checkpoint()
            save_file({k: v.float() for k, v in more.items()}, OUT / "inpainting.safetensors")
            return Model(sd, mode_cases.NINE)
        return Model(tiny_checkpoint())


def run(case, models, texts):
    job = {**BASE, **case}
    model = models.get(job.get("model", "tiny"))
    if "img2img" in job:
        i2i = job["img2img"]
        open_ = lambda name: Image.open(OUT / name)
        mask = open_(i2i["mask"]["file"]) if i2i.get("mask") else None
        with mode_hires.circular(model, job["tiling"]):
            return job, *mode_image.run(job, model, texts, [open_(n) for n in i2i["init"]], mask)
    refiner = job.get("refiner") and dict(job["refiner"], model=models.get("refiner"))
    with mode_hires.circular(model, job["tiling"]):
        return job, *mode_hires.run(job, model, texts, refiner)


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--clip", required=True, help="folder with vocab.json and merges.txt")
    ap.add_argument("--only", default="")
    args = ap.parse_args()
    OUT.mkdir(exist_ok=True)
    mode_cases.write_pictures(OUT)
    texts, models, index = Texts(args.clip), Models(), {}
    mode_refiner.write(OUT, texts.kept)
    wanted = args.only.split(",") if args.only else None
    done_file = OUT / "modes.json"
    if done_file.exists():
        index = {c["name"]: c for c in json.loads(done_file.read_text())}
    for case in mode_cases.CASES:
        if wanted and not any(case["name"].startswith(w) for w in wanted):
            continue
        job, latents, pictures = run(case, models, texts)
        save_file({"latents": latents.contiguous()}, OUT / f"{case['name']}.safetensors")
        for i, picture in enumerate(pictures):
            (OUT / f"{case['name']}.{i}.png").write_bytes(png(picture))
        index[case["name"]] = dict(job, pictures=len(pictures))
        print(case["name"], tuple(latents.shape), f"std {latents.std():.3f} max {latents.abs().max():.3f}", flush=True)
    done_file.write_text("[\n" + ",\n".join(json.dumps(index[c["name"]]) for c in mode_cases.CASES if c["name"] in index) + "\n]\n")


if __name__ == "__main__":
    main()
