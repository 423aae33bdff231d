"""webuiapi 0.9.17, the most used Python client of A1111's API."""

import asyncio
import threading
from urllib.parse import urlparse

import webuiapi
from PIL import Image

from checks import URL, Watched, check, finish, pixels, refused

url = urlparse(URL)
api = Watched(webuiapi.WebUIApi(host=url.hostname, port=url.port, steps=2))
api.util_wait_for_ready(check_interval=0.1)
made = api.txt2img(prompt="a red apple", seed=42, width=128, height=128)


@check
def names_are_listed():
    names = api.util_get_model_names()
    assert names, names
    assert api.util_get_current_model() in names
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in api.util_get_scheduler_names()


@check
def a_picture_is_made_and_made_again():
    assert made.image.size == (128, 128), made.image.size
    assert made.info["seed"] == 42
    assert made.info["infotexts"][0] == made.image.info["parameters"]
    again = api.txt2img(prompt="a red apple", seed=42, width=128, height=128)
    assert pixels(again.image) == pixels(made.image)
    batch = api.txt2img(prompt="a red apple", seed=42, width=128, height=128, n_iter=2)
    assert batch.info["all_seeds"] == [42, 43] and len(batch.images) == 2
    assert pixels(batch.image) == pixels(made.image)


@check
def a_picture_tells_how_it_was_made():
    assert api.png_info(made.image).info.startswith("a red apple")


@check
def hires_fix_doubles_the_size():
    large = api.txt2img(
        prompt="a red apple", seed=42, width=64, height=64, enable_hr=True, hr_scale=2,
        hr_upscaler=webuiapi.HiResUpscaler.Latent, hr_second_pass_steps=2, denoising_strength=0.5,
    )
    assert large.image.size == (128, 128), large.image.size
    assert "Hires upscale: 2.0" in large.info["infotexts"][0], large.info


@check
def pictures_are_changed_and_painted_into():
    changed = api.img2img(images=[made.image], prompt="a green apple", seed=1, width=128, height=128, denoising_strength=0.5)
    assert changed.image.size == (128, 128) and changed.info["denoising_strength"] == 0.5
    assert changed.parameters["init_images"] is None
    mask = Image.new("L", made.image.size, 0)
    mask.paste(255, (32, 32, 96, 96))
    painted = api.img2img(
        images=[made.image], mask_image=mask, mask_blur=0, prompt="a green apple", seed=1, width=128, height=128,
        inpaint_full_res=False, inpainting_fill=1,
    )
    before, after = made.image.convert("RGB"), painted.image.convert("RGB")
    assert after.getpixel((5, 5)) == before.getpixel((5, 5))
    assert after.crop((32, 32, 96, 96)).tobytes() != before.crop((32, 32, 96, 96)).tobytes()


@check
def pictures_are_enlarged():
    one = api.extra_single_image(image=made.image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=2)
    assert one.image.size == (256, 256) and one.info, one.info
    two = api.extra_batch_images(images=[made.image, made.image], upscaler_1="Nearest", resize_mode=1,
                                 upscaling_resize_w=96, upscaling_resize_h=64)
    assert [image.size for image in two.images] == [(96, 64)] * 2


@check
def requests_run_from_asyncio():
    async def both():
        first = api.txt2img(prompt="a dog", seed=1, width=64, height=64, use_async=True)
        second = api.txt2img(prompt="a dog", seed=2, width=64, height=64, use_async=True)
        return await asyncio.gather(first, second)

    results = asyncio.run(both())
    assert [result.info["seed"] for result in results] == [1, 2]
    assert api.async_post and api.post_and_get_api_result


@check
def progress_rises_and_is_interrupted():
    seen, results = [], []
    job = threading.Thread(
        target=lambda: results.append(api.txt2img(prompt="a dog", steps=1000, n_iter=50, seed=1, width=128, height=128)))
    job.start()
    while len({step for value, step in seen if value > 0}) < 4 and job.is_alive():
        progress = api.get_progress()
        seen.append((progress["progress"], progress["state"]["sampling_step"]))
    steps = [step for value, step in seen if value > 0]
    assert steps == sorted(steps), seen
    api.skip()
    while job.is_alive():
        api.interrupt()
        job.join(0.1)
    assert 1 <= len(results[0].images) < 50
    api.util_wait_for_ready(check_interval=0.1)


@check
def lists_have_the_types_that_are_read():
    for method, key in [
        (api.get_samplers, "name"), (api.get_sd_vae, "model_name"), (api.get_upscalers, "name"),
        (api.get_latent_upscale_modes, "name"), (api.get_loras, "name"), (api.get_sd_models, "title"),
        (api.get_hypernetworks, "name"), (api.get_face_restorers, "name"), (api.get_realesrgan_models, "name"),
        (api.get_prompt_styles, "name"), (api.get_schedulers, "name"),
    ]:
        for item in method():
            assert isinstance(item[key], str), (method.__name__, item)
    scripts = api.get_scripts()
    assert scripts["txt2img"] == [name.lower() for name in scripts["txt2img"]]
    assert set(api.get_embeddings()) == {"loaded", "skipped"}
    assert set(api.get_memory()) == {"ram", "cuda"}
    assert "api" in api.get_cmd_flags()
    assert api.refresh_checkpoints() is None


@check
def options_are_kept_and_a_checkpoint_is_chosen():
    api.set_options({"send_seed": False})
    assert api.get_options()["send_seed"] is False
    api.set_options({"send_seed": True})
    name = api.util_get_model_names()[0]
    api.util_set_model(name, find_closest=False)
    assert api.util_get_current_model() == name
    api.util_set_model(name.split(".")[0], find_closest=True)
    assert api.util_get_current_model() == name


@check
def any_route_can_be_asked():
    assert api.get_endpoint("x", True).endswith("/sdapi/v1/x")
    assert api.custom_get("internal/ping") == {}
    assert api.custom_get("progress", baseurl=True)["progress"] == 0
    assert api.custom_post("png-info", payload={"image": webuiapi.b64_img(made.image)}, baseurl=True).info == made.info["infotexts"][0]


@check
def credentials_are_ignored_where_none_are_needed():
    open_api = webuiapi.WebUIApi(host=url.hostname, port=url.port)
    open_api.set_auth("", "")
    assert open_api.get_options()["sd_model_checkpoint"]
    api.set_auth("nobody", "nothing")
    assert api.check_extensions() is None


@check
def captions_are_refused():
    refused(lambda: api.interrogate(made.image), 404, 501)


@check
def controlnet_lists_and_refuses():
    assert isinstance(api.controlnet_version(), int)
    assert isinstance(api.controlnet_model_list(), list)
    assert isinstance(api.controlnet_module_list(), list)
    assert isinstance(webuiapi.ControlNetInterface(api._client).model_list(), list)
    # The client sends the pictures under a name that the route does not have.
    refused(lambda: api.controlnet_detect([made.image]), 422)


finish(api, {"list_prompt_gen_models", "prompt_gen", "get_artists", "get_artist_categories"})
