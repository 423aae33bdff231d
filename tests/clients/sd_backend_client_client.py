"""sd-backend-client 0.5.0: validates every answer against strict models."""

from PIL import Image
from sd_backend_client.api.a1111_webservice import A1111Webservice
from sd_backend_client.api.shared_data.api_datatypes import DiffusionUpscalingParams
from sd_backend_client.api.webui.diffusion_request_body import DiffusionRequestBody

from checks import URL, Watched, check, finish, pixels, refused

service = Watched(A1111Webservice(URL))


def body(**fields):
    return DiffusionRequestBody(**{"prompt": "a red apple", "seed": 7, "steps": 2, "width": 128, "height": 128, **fields})


made = service.submit_txt2img(body()).wait(timeout=600).images[0]
mask = Image.new("L", made.size, 0)
mask.paste(255, (32, 32, 96, 96))


@check
def a_batch_arrives_in_order():
    result = service.submit_txt2img(body(batch_size=2)).wait(timeout=600)
    assert len(result.images) == 2 and result.seeds == [7, 8], result
    assert pixels(result.images[0]) == pixels(made)
    again = service.txt2img(body())
    assert pixels(again["images"][0]) == pixels(made) and again["info"].seed == 7
    assert isinstance(again["info"].version, str) and isinstance(again["info"].sd_model_hash, str)


@check
def the_checkpoint_is_named_as_the_list_names_it():
    name = service.list_checkpoints()[0].name
    result = service.txt2img(body(sd_model_name=name))
    assert result["info"].sd_model_name == name.rsplit(".", 1)[0], (name, result["info"].sd_model_name)


@check
def pictures_are_changed_and_painted_into():
    changed = service.img2img(made, None, body(prompt="a green apple", denoising_strength=0.5))
    assert changed["images"][0].size == made.size
    assert service.submit_img2img(body(init_images=[made])).wait(timeout=600).images[0].size == made.size
    for fields in ({}, {"inpaint_full_res": True, "inpaint_full_res_padding": 8}):
        painted = service.submit_inpaint(body(init_images=[made], mask=mask, mask_blur=0, **fields)).wait(timeout=600)
        after = painted.images[0].convert("RGB")
        assert after.getpixel((5, 5)) == made.convert("RGB").getpixel((5, 5))


@check
def pictures_are_enlarged():
    assert service.upscale(made, 256, 256)["images"][0].size == (256, 256)
    params = DiffusionUpscalingParams(
        use_stable_diffusion_upscaling=True, use_ultimate_upscale_script=False, step_count=2, diffusion_params=body())
    for options in (None, params):
        assert service.submit_upscale(made, 192, 192, options).wait(timeout=600).images[0].size == (192, 192)


@check
def a_job_is_watched_and_cancelled():
    handle = service.submit_txt2img(body(steps=1000, n_iter=50))
    while (handle.poll().progress or 0) == 0:
        pass
    assert service.progress_check().state.job_count > 0
    service.interrupt()
    while not handle.done:
        handle.cancel()
    while service.progress_check().state.job_count > 0:
        pass


@check
def lists_have_the_types_that_are_read():
    for method in (
        service.get_models, service.get_samplers, service.get_vae, service.get_loras, service.get_styles, service.list_vaes,
        service.list_loras, service.list_samplers, service.list_schedulers, service.list_hypernetworks, service.get_hypernetworks,
        service.get_latent_upscale_modes,
    ):
        assert isinstance(method(), list), method.__name__
    assert service.get_upscalers()[0].name == "None"
    assert "None" not in [upscaler.name for upscaler in service.list_upscalers()]
    for refresh in (service.refresh_checkpoints, service.refresh_vae, service.refresh_loras):
        assert refresh().json() is None
    assert service.get("/sdapi/v1/memory").json()["ram"]
    assert service.post("/sdapi/v1/skip", None).json() is None


@check
def options_are_kept():
    service.set_config({"send_size": False})
    assert service.get_config()["send_size"] is False
    service.set_config({"send_size": True})


@check
def a_missing_thumbnail_is_none():
    assert service.get_thumbnail("nothing.png") is None


@check
def scripts_are_described():
    assert "soft inpainting" in service.get_scripts().img2img
    assert any(script.name == "soft inpainting" and script.is_img2img for script in service.get_script_info())
    parameters = service.get_soft_inpainting_parameters()
    assert [parameter.key for parameter in parameters][:2] == ["schedule_bias", "preservation_strength"]
    painted = service.submit_inpaint(body(init_images=[made], mask=mask, mask_blur=8, soft_inpainting=True)).wait(timeout=600)
    assert painted.images[0].size == made.size
    assert "Soft inpainting enabled: True" in painted.raw_info.infotexts[0], painted.raw_info.infotexts


@check
def captions_are_refused():
    refused(lambda: service.interrogate(made), 404, 501)


@check
def features_are_detected():
    found = service.get_capabilities()
    assert found.scheduler and found.soft_inpainting and found.interrogate, found
    assert not found.ultimate_upscale, found


@check
def controlnet_lists_and_refuses():
    assert isinstance(service.get_controlnet_version(), int)
    assert isinstance(service.get_controlnet_models().model_list, list)
    assert isinstance(service.get_controlnet_modules().module_list, list)
    assert isinstance(service.list_controlnet_models(), list)
    assert "control_types" in service.get_controlnet_control_types()
    assert service.get_controlnet_settings()["control_net_unit_count"] == 3
    assert service.get_controlnet_type_categories() is not None
    for preprocessor in service.get_controlnet_preprocessors():
        preview = lambda: service.controlnet_preprocessor_preview(made, None, preprocessor)
        if preprocessor.name == "none":
            assert preview().size == made.size
            assert service.submit_preprocessor_preview(made, preprocessor).wait(timeout=600).images[0].size == made.size


@check
def the_login_of_the_web_interface_answers():
    assert service.login("nobody", "nothing").status_code in (200, 400, 401)
    assert service.login_check().status_code == 200


service.disconnect()
assert service.set_auth and service.generation_timeout and service.server_url and service.request_timeout
finish(service, {"Endpoints", "ForgeEndpoints"})
