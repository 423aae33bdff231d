"""The cases, as requests, and the pictures that they start from."""
import numpy as np
from PIL import Image

from common import VARIANTS

TINY = VARIANTS["public"]
NINE = {**TINY, "unet": {**TINY["unet"], "in_channels": 9}}


def scene(width, height, shift):
    """Smooth colours with an edge and a disc."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    planes = [127 + 90 * np.sin(x / (9 + 3 * c) + y / (17 - 4 * c) + shift + c) for c in range(3)]
    a = np.stack(planes, -1)
    a[(x - width * 0.4) ** 2 + (y - height * 0.5) ** 2 < (height * 0.25) ** 2] = (230, 60 + 40 * shift, 40)
    a[y > height * 0.8] *= 0.5
    return Image.fromarray(a.clip(0, 255).round().astype(np.uint8))


def boxes(width, height, *parts):
    a = np.zeros((height, width), np.uint8)
    for x1, y1, x2, y2 in parts:
        a[y1:y2, x1:x2] = 255
    return Image.fromarray(a)


def write_pictures(out):
    scene(96, 64, 0).save(out / "init.png", optimize=True)
    scene(96, 64, 2).save(out / "second.png", optimize=True)
    scene(80, 88, 1).save(out / "tall.png", optimize=True)
    scene(160, 120, 1).save(out / "large.png", optimize=True)
    scene(101, 79, 1).save(out / "odd.png", optimize=True)
    boxes(96, 64, (30, 14, 66, 50)).save(out / "mask.png", optimize=True)
    boxes(160, 120, (98, 22, 128, 44), (110, 40, 122, 60)).save(out / "corner.png", optimize=True)
    boxes(80, 88, (20, 30, 60, 88)).save(out / "tall_mask.png", optimize=True)


# `prompt` may be [[end, text], ...], what the prompt language makes of `text`.


def image(name, init="init.png", mask=None, more=None, **fields):
    init = [init] if isinstance(init, str) else init
    i2i = {"init": init, "resize_mode": 0, "strength": 0.6, **(more or {})}
    if mask:
        i2i["mask"] = {"file": "mask.png", "blur": [4, 4], "invert": False, "area": "whole", "padding": 32, "fill": 1, "overlay": True,
                       "weight": 1.0, **mask}
    return {"name": name, **fields, "img2img": i2i}


SOFT = {"power": 1.0, "scale": 0.5, "contrast": 4.0, "influence": 0.0, "threshold": 0.5, "difference_contrast": 2.0}

# DPM adaptive is not among them: its steps follow the error, and 1e-6 more of noise moves these latents by 5e-2.
IMAGE = [
    image("image_euler", seed=5, steps=10),
    image("image_fill_color", "tall.png", seed=6, sampler="DPM++ 2M", scheduler="Karras",
          more={"resize_mode": 2, "strength": 0.75, "noise_multiplier": 1.05, "color_correction": True}),
    image("image_crop", "large.png", seed=7, sampler="Heun", steps=6, width=64, height=72, more={"resize_mode": 1, "strength": 0.5, "extra_noise": 0.1}),
    image("image_latent_ddim", "large.png", seed=8, sampler="DDIM", steps=10, more={"resize_mode": 3, "strength": 0.7}),
    image("image_latent_odd", "odd.png", seed=8, more={"resize_mode": 3, "strength": 0.3}),
    image("image_exact", seed=9, sampler="DPM++ 2M", steps=6, more={"exact": True, "strength": 0.4}),
    image("image_exact_ddim", seed=9, sampler="DDIM", steps=6, more={"exact": True, "strength": 0.4}),
    image("image_batch", ["init.png", "second.png"], seed=2 ** 32 - 1, sampler="Euler a", batch=2),
    image("image_2m_sde", seed=11, sampler="DPM++ 2M SDE", more={"strength": 0.5}),
    image("image_sde", seed=12, sampler="DPM++ SDE", scheduler="Karras", steps=6, more={"strength": 0.5}),
    image("image_3m_sde", seed=13, sampler="DPM++ 3M SDE", more={"strength": 0.6}),
    image("image_dpm_fast", seed=14, sampler="DPM fast", steps=9, more={"strength": 0.7}),
    image("image_plms", seed=14, sampler="PLMS", steps=10, more={"strength": 0.7}),
    image("image_unipc", seed=14, sampler="UniPC", steps=10, more={"strength": 0.7}),
    image("image_full", seed=15, sampler="Euler", negative="", scheduler="SGM Uniform", more={"strength": 1.0}),
    image("image_tiling", seed=16, sampler="Euler", tiling=True),
    image("image_edit", seed=17, text="a photo of a [cat:dog:5]", prompt=[[5, "a photo of a cat"], [10, "a photo of a dog"]], steps=10),
]
INPAINT = [
    image("inpaint_original", seed=21, sampler="Euler a", mask={}),
    image("inpaint_resized", "tall.png", seed=21, sampler="Euler a", mask={"file": "tall_mask.png", "blur": [3, 6]}, more={"resize_mode": 1}),
    image("inpaint_only_masked", "large.png", seed=22, sampler="DPM++ 2M", mask={"file": "corner.png", "area": "only masked", "padding": 32},
          more={"color_correction": True}),
    image("inpaint_only_masked_fill", "large.png", seed=22, sampler="Euler", width=64, height=64,
          mask={"file": "corner.png", "area": "only masked", "padding": 4, "fill": 0}, more={"color_correction": True}),
    image("inpaint_noise", seed=23, sampler="DPM++ 2M", mask={"fill": 2}, more={"strength": 0.9}),
    image("inpaint_noise_batches", seed=23, subseed=77, subseed_strength=0.4, sampler="Euler", steps=5, width=64, batches=2, mask={"fill": 2}, more={"strength": 0.9}),
    image("inpaint_nothing", seed=24, sampler="Euler", mask={"fill": 3, "invert": True}, more={"strength": 0.8}),
    image("inpaint_fill", seed=25, sampler="Euler", mask={"fill": 0}),
    image("inpaint_ddim", seed=26, sampler="DDIM", steps=10, mask={}, more={"strength": 0.7}),
    image("inpaint_no_overlay", seed=27, sampler="Euler", mask={"overlay": False, "blur": [0, 0]}),
    image("inpaint_model", seed=28, sampler="Euler a", model="inpainting", mask={"weight": 1.0}),
    image("inpaint_model_weight", ["init.png", "second.png"], seed=29, batch=2, sampler="DPM++ 2M", model="inpainting", mask={"weight": 0.6, "area": "only masked"}),
    image("inpaint_model_no_mask", seed=30, model="inpainting"),
    {"name": "inpaint_model_txt2img", "seed": 31, "model": "inpainting"},
    image("inpaint_soft", seed=32, sampler="Euler a", mask={"soft": SOFT, "blur": [8, 8]}),
    image("inpaint_soft_only_masked", "large.png", seed=33, sampler="DPM++ 2M",
          mask={"file": "corner.png", "area": "only masked", "padding": 8, "blur": [6, 6], "soft": {**SOFT, "influence": 0.4, "scale": 0.8, "power": 1.3}}),
    image("inpaint_soft_batch", ["init.png", "second.png"], seed=32, sampler="Euler a", batch=2, mask={"soft": SOFT, "blur": [8, 8]}, more={"color_correction": True}),
    image("inpaint_soft_ddim", seed=34, sampler="DDIM", steps=10, mask={"soft": SOFT, "blur": [8, 8]}, more={"strength": 0.7}),
    image("inpaint_soft_model", seed=35, sampler="Euler", model="inpainting", mask={"soft": SOFT, "blur": [8, 8]}),
]


def from_text(name, hires=None, **fields):
    job = {"name": name, "width": 64, "height": 48, **fields}
    return {**job, "hires": {"upscaler": "Latent", "scale": 2.0, "strength": 0.7, **hires}} if hires is not None else job


HIRES = [
    from_text("hires_latent", {}, seed=41),
    from_text("hires_truncated", {"upscaler": "Latent (nearest-exact)", "resize": [104, 72], "steps": 6, "sampler": "DPM++ 2M", "scheduler": "Karras", "cfg": 4.0,
                             "prompt": "castle at night", "negative": "bad anatomy"}, seed=42, width=64, height=72),
    from_text("hires_truncated_wide", {"upscaler": "Latent (bicubic antialiased)", "resize": [72, 96], "strength": 0.5}, seed=42),
    from_text("hires_lanczos", {"upscaler": "Lanczos", "scale": 1.5}, seed=43, sampler="DPM++ 2M", scheduler="Karras"),
    from_text("hires_lanczos_odd", {"upscaler": "Lanczos", "scale": 1.3}, seed=43, sampler="DPM++ 2M", scheduler="Karras"),
    from_text("hires_none_odd", {"upscaler": "None", "resize": [100, 68]}, seed=44),
    from_text("hires_sde", {"strength": 0.5}, seed=45, sampler="DPM++ SDE", scheduler="Karras", steps=5),
    from_text("hires_2m_sde_batch", {"strength": 0.5, "scale": 1.5}, seed=46, sampler="DPM++ 2M SDE", batch=2),
    from_text("hires_ancestral", {"upscaler": "Latent (antialiased)", "strength": 0.4}, seed=47, sampler="Euler a"),
    from_text("hires_tiling", {"upscaler": "Lanczos", "scale": 1.5, "strength": 0.5}, seed=48, tiling=True),
    from_text("hires_ddim", {"strength": 0.6}, seed=48, sampler="DDIM", steps=10),
    # The first pass knows the cat alone, the second changes after half of its 8 calls.
    from_text("hires_edit", {"prompt": [[4, "a photo of a cat"], [8, "a photo of a dog"]]}, seed=49, text="a photo of a [cat:dog:1.5]"),
    from_text("hires_variation", {"strength": 0.6}, seed=50, subseed=9, subseed_strength=0.3, seed_resize_from=[48, 64]),
]
NOISE = [
    from_text("tiling_euler", seed=61, tiling=True, width=96, height=64),
    from_text("tiling_2m", seed=62, tiling=True, width=64, height=104, sampler="DPM++ 2M"),
    from_text("variation", seed=63, subseed=1000, subseed_strength=0.25, batch=2, sampler="Euler a"),
    from_text("variation_resize", seed=64, subseed=5, subseed_strength=0.5, seed_resize_from=[96, 40], width=64, height=72),
]
REFINED = [
    from_text("refiner_euler", seed=71, refiner={"switch_at": 0.5}, width=96, height=64),
    from_text("refiner_2m", seed=72, refiner={"switch_at": 0.5}, sampler="DPM++ 2M", negative="", width=64, height=96),
    from_text("refiner_ddim", seed=73, refiner={"switch_at": 0.8}, sampler="DDIM", steps=10, width=96, height=64),
    from_text("refiner_hires", {}, seed=74, refiner={"switch_at": 0.7}),
    from_text("refiner_both_passes", {"upscaler": "Lanczos", "scale": 1.5, "strength": 0.6}, seed=75,
              refiner={"switch_at": 0.6, "passes": "both passes"}, width=96, height=64),
    from_text("refiner_first_pass", {"upscaler": "None", "scale": 1.5, "strength": 0.6}, seed=76,
              refiner={"switch_at": 0.6, "passes": "first pass"}, width=96, height=64),
]
CASES = IMAGE + INPAINT + HIRES + NOISE + REFINED
