"""Drives a server with webuiapi 0.9.17, the most used Python client of A1111's API. SDGEN_BASE_URL names the server."""

import os
import threading
from urllib.parse import urlparse

import webuiapi

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
