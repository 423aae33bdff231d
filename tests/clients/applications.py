"""What applications send and read, as recorded from their sources: Open WebUI, SillyTavern, LibreChat, text-generation-webui,
AIYA, Auto-Photoshop-SD and drawbridge, with `requests` in their place."""

import base64
import json
import threading
import time

import requests

from checks import URL, check, finish, picture

session = requests.Session()
SMALL = {"width": 128, "height": 128, "steps": 2}


def get(path, **more):
    answer = session.get(URL + path, **more)
    assert answer.status_code == 200, (path, answer.status_code, answer.text)
    return answer.json()


def post(path, body=None, **more):
    answer = session.post(URL + path, json=body, **more)
    assert answer.status_code == 200, (path, answer.status_code, answer.text)
    return answer.json()


@check
def open_webui_sets_a_model_by_sending_all_options_back():
    empty = {"headers": {"authorization": ""}}
    options = get("/sdapi/v1/options", **empty)
    models = get("/sdapi/v1/sd-models", **empty)
    assert all(model["title"] and model["model_name"] for model in models)
    assert options["sd_model_checkpoint"] in [model["title"] for model in models]
    post("/sdapi/v1/options", options, **empty)
    assert get("/sdapi/v1/options", **empty) == options
    made = post("/sdapi/v1/txt2img", {"prompt": "tree", "batch_size": 2, **SMALL}, **empty)
    assert len(made["images"]) == 2 and json.loads(made["info"])["seed"] >= 0
    assert [picture(image).size for image in made["images"]] == [(128, 128)] * 2


@check
def sillytavern_fills_its_menus_and_makes_a_picture():
    unset = {"headers": {"Authorization": "Basic " + base64.b64encode(b"").decode()}}
    options = get("/sdapi/v1/options", **unset)
    assert "forge_preset" not in options
    upscalers = [upscaler["name"] for upscaler in get("/sdapi/v1/upscalers", **unset)]
    latent = [mode["name"] for mode in get("/sdapi/v1/latent-upscale-modes", **unset)]
    assert upscalers[0] == "None" and latent[0] == "Latent"
    assert all(item["name"] for path in ("samplers", "schedulers") for item in get(f"/sdapi/v1/{path}", **unset))
    assert all(model["model_name"] for model in get("/sdapi/v1/sd-vae", **unset))
    assert session.get(URL + "/sdapi/v1/sd-modules", **unset).status_code == 404
    post("/sdapi/v1/options", {"sd_model_checkpoint": get("/sdapi/v1/sd-models", **unset)[0]["title"]}, **unset)
    progress = get("/sdapi/v1/progress", **unset)
    assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0
    made = post("/sdapi/v1/txt2img", {
        "prompt": "tree", "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "Automatic", "cfg_scale": 7,
        "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "hr_additional_modules": [],
        "denoising_strength": 0.7, "hr_second_pass_steps": 0, "save_images": True, "send_images": True, "do_not_save_grid": False,
        "do_not_save_samples": False, "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True, "clip_skip": 1, **SMALL,
    }, **unset)
    assert picture(made["images"][0]).format == "PNG" and len(made["images"]) == 1


@check
def sillytavern_interrupts_when_its_user_leaves():
    answers = []
    long = {"prompt": "tree", "steps": 1000, "n_iter": 50, "width": 128, "height": 128}
    job = threading.Thread(target=lambda: answers.append(post("/sdapi/v1/txt2img", long)), daemon=True)
    job.start()
    # The step of the job before stays until this one begins; the progress is 0 until then.
    while get("/sdapi/v1/progress")["progress"] == 0:
        assert job.is_alive()
    assert session.post(URL + "/sdapi/v1/interrupt").json() == {}
    job.join(120)
    assert answers and len(answers[0]["images"]) < 50


@check
def librechat_reads_the_text_before_the_first_comma():
    made = post("/sdapi/v1/txt2img", {"prompt": "tree", "negative_prompt": "fog", "cfg_scale": 4.5, **SMALL})
    info = json.loads(made["info"])
    assert picture(made["images"][0]).size == (info["width"], info["height"]) == (128, 128)
    assert info["infotexts"][0].split("\n")[-1].startswith("Steps: 2, ") and isinstance(info["seed"], int)


@check
def text_generation_webui_unloads_and_sends_numbers_as_text():
    for action in ("unload-checkpoint", "reload-checkpoint"):
        post(f"/sdapi/v1/{action}", "")
    assert get("/sdapi/v1/options")["sd_model_checkpoint"] == get("/sdapi/v1/sd-models")[0]["title"]
    sampler = get("/sdapi/v1/samplers")[0]["name"]
    made = post("/sdapi/v1/txt2img", {
        "prompt": "tree", "seed": -1, "sampler_name": sampler, "enable_hr": False, "hr_scale": "1.0", "hr_upscaler": "Latent",
        "denoising_strength": 0, "cfg_scale": 7, "restore_faces": False, "negative_prompt": "", **SMALL,
    })
    assert picture(made["images"][0]).size == (128, 128)
    assert made["parameters"]["seed"] == -1 and json.loads(made["info"])["seed"] >= 0


@check
def aiya_starts_and_reads_each_picture_back():
    assert session.get(URL + "/sdapi/v1/cmd-flags").status_code == 200
    assert session.head(URL).status_code == 200
    for path, keys in [
        ("samplers", ["name"]), ("prompt-styles", ["name", "prompt", "negative_prompt"]), ("face-restorers", ["name"]),
        ("hypernetworks", ["name"]), ("upscalers", ["name"]), ("sd-models", ["filename", "model_name", "title", "hash"]),
    ]:
        assert all(key in item for item in get(f"/sdapi/v1/{path}") for key in keys), path
    embeddings = get("/sdapi/v1/embeddings")
    assert all(item["shape"] for group in ("loaded", "skipped") for item in embeddings[group].values())
    post("/sdapi/v1/options", {"sd_model_checkpoint": get("/sdapi/v1/sd-models")[0]["title"]})
    overrides = {"CLIP_stop_at_last_layers": 1, "face_restoration_model": "None"}
    made = post("/sdapi/v1/txt2img", {"prompt": "tree", "override_settings": overrides, **SMALL})
    init = "data:image/png;base64," + made["images"][0]
    changed = post("/sdapi/v1/img2img", {"prompt": "bush", "init_images": [init], "override_settings": overrides, **SMALL})
    for answer, prompt in ((made, "tree"), (changed, "bush")):
        text = post("/sdapi/v1/png-info", {"image": "data:image/png;base64," + answer["images"][0]})["info"]
        assert text.startswith(prompt), text
    large = post("/sdapi/v1/extra-single-image", {"image": init, "upscaler_1": "Lanczos", "upscaling_resize": 2})
    assert picture(large["image"]).size == (256, 256)


def components():
    return {item["props"].get("elem_id"): item["props"].get("choices") for item in get("/config")["components"]}


@check
def aiya_reads_the_page_layout():
    session.post(URL + "/login")
    assert "None" in components()["setting_sd_lora"]
    assert "Latent" in components()["txt2img_hr_upscaler"]


@check
def auto_photoshop_reads_menus_and_watches_a_job():
    assert get("/sdapi/v1/sd-models")[0]["title"] and get("/sdapi/v1/samplers")[0]["name"]
    post("/sdapi/v1/options", {"inpainting_mask_weight": 1.0})
    assert get("/sdapi/v1/options")["inpainting_mask_weight"] == 1.0
    answers, seen = [], set()
    # Few enough steps for a slow machine, enough for a picture to be seen on the way.
    body = {"prompt": "tree", "steps": 200, "width": 128, "height": 128, "sampler_index": "Euler a", "subseed": -1, "restore_faces": False}
    job = threading.Thread(target=lambda: answers.append(post("/sdapi/v1/txt2img", body)), daemon=True)
    job.start()
    while job.is_alive():
        progress = get("/sdapi/v1/progress?skip_current_image=false")
        if progress["current_image"] and progress["progress"] > 0:
            seen.add(picture(progress["current_image"]).size)
            assert session.post(URL + "/sdapi/v1/interrupt").json() == {}
        time.sleep(0.01)
    assert seen and picture(answers[0]["images"][0]).size == (128, 128)


@check
def auto_photoshop_reads_the_page_layout_and_controlnet():
    assert "None" in components()["txt2img_hr_upscaler"]
    assert isinstance(get("/controlnet/model_list")["model_list"], list)
    assert isinstance(get("/controlnet/module_list?alias_names=1")["module_list"], list)


@check
def drawbridge_takes_the_status_codes_as_health():
    assert get("/sdapi/v1/options") and get("/sdapi/v1/progress")["state"]["job_count"] == 0
    assert get("/sdapi/v1/memory")["ram"]["total"] > 0
    assert isinstance(get("/sdapi/v1/sd-models"), list) and isinstance(get("/sdapi/v1/prompt-styles"), list)
    made = post("/sdapi/v1/txt2img", {"prompt": "tree", **SMALL})
    post("/sdapi/v1/img2img", {"prompt": "tree", "init_images": made["images"], **SMALL})
    post("/sdapi/v1/options", {"sd_model_checkpoint": get("/sdapi/v1/options")["sd_model_checkpoint"]})


@check
def drawbridge_finds_no_login():
    assert session.post(URL + "/login", data={"username": "a", "password": "b"}).status_code in (200, 400, 401)


@check
def features_are_probed_by_status_codes():
    assert session.get(URL + "/sdapi/v1/txt2img").status_code == 405
    assert session.get(URL + "/sdapi/v1/nope").status_code == 404
    assert get("/internal/ping") == {}
    get("/sdapi/v1/progress?skipCurrentImage=true&skip_current_image=1")


@check
def captioning_exists_but_is_refused():
    assert session.get(URL + "/sdapi/v1/interrogate").status_code == 405


finish()
