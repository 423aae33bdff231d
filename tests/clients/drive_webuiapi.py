"""Drives a server with webuiapi 0.9.17, the most used Python client of A1111's API. SDGEN_BASE_URL names the server."""

import os
import threading
from urllib.parse import urlparse

import webuiapi
from PIL import Image

url = urlparse(os.environ["SDGEN_BASE_URL"])
api = webuiapi.WebUIApi(host=url.hostname, port=url.port, steps=2)
api.util_wait_for_ready(check_interval=0.1)

names = api.util_get_model_names()
assert names, names
assert api.util_get_current_model() in names
assert "Euler a" in api.util_get_sampler_names()
assert "karras" in api.util_get_scheduler_names()

made = api.txt2img(prompt="a red apple", seed=42, width=128, height=128)
assert made.image.size == (128, 128), made.image.size
assert made.info["seed"] == 42
assert made.info["infotexts"][0] == made.image.info["parameters"]
again = api.txt2img(prompt="a red apple", seed=42, width=128, height=128)
assert again.image.convert("RGB").tobytes() == made.image.convert("RGB").tobytes()
batch = api.txt2img(prompt="a red apple", seed=42, width=128, height=128, n_iter=2)
assert batch.info["all_seeds"] == [42, 43] and len(batch.images) == 2
assert api.png_info(made.image).info.startswith("a red apple")

large = api.txt2img(
    prompt="a red apple", seed=42, width=64, height=64, enable_hr=True, hr_scale=2,
    hr_upscaler=webuiapi.HiResUpscaler.Latent, hr_second_pass_steps=2, denoising_strength=0.5,
)
assert large.image.size == (128, 128), large.image.size
assert "Hires upscale: 2.0" in large.info["infotexts"][0], large.info
changed = api.img2img(images=[made.image], prompt="a green apple", seed=1, width=128, height=128, denoising_strength=0.5)
assert changed.image.size == (128, 128) and changed.info["denoising_strength"] == 0.5
mask = Image.new("L", made.image.size, 0)
mask.paste(255, (32, 32, 96, 96))
painted = api.img2img(
    images=[made.image], mask_image=mask, mask_blur=0, prompt="a green apple", seed=1, width=128, height=128,
    inpaint_full_res=False, inpainting_fill=1,
)
before, after = made.image.convert("RGB"), painted.image.convert("RGB")
assert after.getpixel((5, 5)) == before.getpixel((5, 5))
assert after.crop((32, 32, 96, 96)).tobytes() != before.crop((32, 32, 96, 96)).tobytes()

seen = []
job = threading.Thread(target=lambda: api.txt2img(prompt="a dog", steps=100, seed=1, width=128, height=128))
job.start()
while job.is_alive():
    progress = api.get_progress()
    seen.append((progress["progress"], progress["state"]["sampling_step"]))
job.join()
steps = [step for value, step in seen if value > 0]
assert len(set(steps)) > 2 and steps == sorted(steps), seen

for method in (
    api.get_options, api.get_cmd_flags, api.get_progress, api.get_samplers, api.get_sd_vae, api.get_upscalers,
    api.get_latent_upscale_modes, api.get_sd_models, api.get_hypernetworks, api.get_face_restorers,
    api.get_realesrgan_models, api.get_prompt_styles, api.get_scripts, api.get_memory, api.get_schedulers,
    api.refresh_checkpoints, api.interrupt, api.skip,
):
    method()
api.set_options({"send_seed": True})
api.util_set_model(names[0], find_closest=False)
assert api.util_get_current_model() == names[0]
