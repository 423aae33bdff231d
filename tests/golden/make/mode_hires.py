"""Text to image, with hires fix, circular padding, variation seeds and a refiner, as `StableDiffusionProcessingTxt2Img` of A1111."""
import contextlib

import torch
from PIL import Image

from mode_parts import Denoiser, ImageNoise, decode, encode_picture, expected_calls, sample, to_planes

LATENT = {"Latent": ("bilinear", False), "Latent (antialiased)": ("bilinear", True), "Latent (bicubic)": ("bicubic", False),
          "Latent (bicubic antialiased)": ("bicubic", True), "Latent (nearest)": ("nearest", False), "Latent (nearest-exact)": ("nearest-exact", False)}


@contextlib.contextmanager
def circular(model, on):
    """Every convolution of UNet and VAE wraps around."""
    layers = [m for part in (model.unet, model.vae) for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    for layer in layers if on else []:
        layer.padding_mode = "circular"
    yield
    for layer in layers:
        layer.padding_mode = "zeros"


def target(hires, width, height):
    """Size enlarged to, and latent columns and rows cut off."""
    x, y = hires.get("resize", (0, 0))
    if x == 0 and y == 0:
        return int(width * hires["scale"]), int(height * hires["scale"]), 0, 0
    if y == 0:
        return x, x * height // width, 0, 0
    if x == 0:
        return y * width // height, y, 0, 0
    w, h = (x, x * height // width) if width / height < x / y else (y * width // height, y)
    return w, h, (w - x) // 8, (h - y) // 8


def upscaled(picture, name, width, height):
    """A1111's upscaler, which makes multiples of 8, and Lanczos to the size if that is another."""
    scale, lanczos = max(width / picture.width, height / picture.height), Image.Resampling.LANCZOS
    if name != "None" and scale > 1:
        how = {"Lanczos": lanczos, "Nearest": Image.Resampling.NEAREST}[name]
        whole = int(picture.width * scale // 8 * 8), int(picture.height * scale // 8 * 8)
        for turn in range(3):
            if picture.width >= whole[0] and picture.height >= whole[1] and (turn > 0 or scale != 1):
                break
            before = picture.size
            picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), how)
            if picture.size == before:
                break
        if picture.size != whole:
            picture = picture.resize(whole, lanczos)
    return picture if picture.size == (width, height) else picture.resize((width, height), lanczos)


def enlarged(model, decoder, latents, hires, size):
    """Decoded by the model that has made them, encoded by that of the second pass."""
    width, height, cut_x, cut_y = target(hires, *size)
    name = hires["upscaler"]
    if name in LATENT:
        mode, antialias = LATENT[name]
        latents = torch.nn.functional.interpolate(latents, size=(height // 8, width // 8), mode=mode, antialias=antialias)
    else:
        pictures = [upscaled(p, name, width, height) for p in decode(decoder.vae, latents)]
        latents = encode_picture(model.vae, torch.stack([to_planes(p) for p in pictures]) * 2 - 1)
    h, w = latents.shape[2:]
    return latents[:, :, cut_y // 2:h - (cut_y + 1) // 2, cut_x // 2:w - (cut_x + 1) // 2], (width, height)


def all_painted(model, width, height, h, w):
    """What an inpainting checkpoint is shown where there is no picture: grey, all of it masked."""
    if model.unet.config.in_channels != 9:
        return None
    grey = encode_picture(model.vae, torch.zeros(1, 3, height, width))
    return torch.cat([torch.ones(1, 1, h, w), grey], 1)


def run(job, model, texts, refiner):
    width, height, hires = job["width"], job["height"], job.get("hires")
    strength = job.get("subseed_strength", 0.0)
    total = job["batch"] * job["batches"]
    all_seeds = [job["seed"] + (i if strength == 0 else 0) for i in range(total)]
    all_subseeds = [job.get("subseed", 0) + i for i in range(total)]
    latents, done = [], []
    for b in range(job["batches"]):
        part = slice(b * job["batch"], (b + 1) * job["batch"])
        seeds, subseeds = all_seeds[part], all_subseeds[part]

        def noise_for(h, w):
            return ImageNoise((4, h, w), seeds, subseeds, strength, job.get("seed_resize_from"))

        passes = refiner.get("passes", "second pass") if refiner else ""  # of hires fix; without it there is one
        in_first = refiner if not hires or passes in ("first pass", "both passes") else None
        in_second = refiner if passes in ("second pass", "both passes") else None
        noise = noise_for(height // 8, width // 8)
        guide = Denoiser(job, model, texts, (job["prompt"], job["negative"]), (width, height), job["cfg"], expected_calls(job["sampler"], job["steps"]),
                         extra=all_painted(model, width, height, height // 8, width // 8), refiner=in_first)
        x = sample(job, guide, noise, noise.next())
        if hires:
            x, size = enlarged(model, guide.model, x, hires, (width, height))
            noise = noise_for(*x.shape[2:])
            second = {**job, **{k: hires[k] for k in ("sampler", "scheduler", "steps") if hires.get(k)}}
            prompts = [hires.get(k) or job[k] for k in ("prompt", "negative")]
            guide = Denoiser(job, model, texts, prompts, size, hires.get("cfg", job["cfg"]), expected_calls(second["sampler"], second["steps"]),
                             refiner=in_second)
            x = sample(second, guide, noise, noise.next(), (x, hires["strength"], True))
        latents.append(x)
        done += decode(guide.model.vae, x)
    return torch.cat(latents), done
