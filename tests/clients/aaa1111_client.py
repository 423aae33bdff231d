"""aaa1111 0.1.0.dev7: builds a typed object from each answer, so a key too many fails. Has each method twice, once async."""

import asyncio

from aaa1111 import AAA1111
from aaa1111.types import IMG2IMG, TXT2IMG, ExtrasSingleImage

from checks import URL, Watched, check, finish, pixels, refused

client = Watched(AAA1111(base_url=URL))
LISTS = (
    "samplers", "upscalers", "latent_upscale_modes", "sd_models", "sd_vae", "hypernetworks", "face_restorers",
    "realesrgan_models", "prompt_styles", "embeddings", "memory", "scripts", "script_info", "loras", "progress", "get_options",
    "cmd_flags",
)
ACTIONS = ("interrupt", "skip", "refresh_checkpoints", "refresh_loras", "unload_checkpoint", "reload_checkpoint")
# As a mapping: what the client makes of its own `FileData` cannot be sent.
BATCH = {"upscaler_1": "Nearest"}
SMALL = {"prompt": "a red apple", "seed": 7, "steps": 2, "width": 128, "height": 128}

made = client.txt2img(TXT2IMG(**SMALL)).images[0]


@check
def each_list_has_exactly_the_known_keys():
    for name in LISTS:
        getattr(client, name)()


@check
def each_action_is_answered():
    for name in ACTIONS:
        getattr(client, name)()


@check
def pictures_are_made_changed_and_enlarged():
    result = client.txt2img(SMALL)
    assert pixels(result.images[0]) == pixels(made) and result.info["all_seeds"] == [7], result.info
    changed = client.img2img(IMG2IMG(init_images=[made], denoising_strength=0.5, **SMALL))
    assert changed.images[0].size == (128, 128)
    one = client.extra_single_image(ExtrasSingleImage(image=made, upscaler_1="Lanczos"))
    assert one.image.size == (256, 256) and one.html_info
    two = client.extra_batch_images({**BATCH, "imageList": [{"data": made, "name": name} for name in "ab"]})
    assert [image.size for image in two.images] == [(256, 256)] * 2


@check
def options_are_kept():
    client.set_options(send_seed=False)
    assert client.get_options()["send_seed"] is False
    client.set_options(send_seed=True)


@check
def everything_works_from_asyncio():
    async def all_of_it():
        for name in LISTS + ACTIONS:
            await getattr(client, "a" + name)()
        await client.aset_options(send_seed=True)
        result = await client.atxt2img(SMALL)
        assert pixels(result.images[0]) == pixels(made)
        changed = await client.aimg2img(IMG2IMG(init_images=[made], denoising_strength=0.5, **SMALL))
        assert changed.images[0].size == (128, 128)
        one = await client.aextra_single_image(ExtrasSingleImage(image=made, upscaler_1="Lanczos"))
        assert one.image.size == (256, 256)
        two = await client.aextra_batch_images({**BATCH, "imageList": [{"data": made, "name": "a"}]})
        assert two.images[0].size == (256, 256)
        await client.aget("/internal/ping")
        await client.apost("/sdapi/v1/skip")
        # The client's type for png-info lacks the key `parameters` that A1111 has had since 1.7.
        try:
            await client.apng_info(made)
        except TypeError as error:
            assert "parameters" in str(error)
        try:
            await client.ainterrogate()
        except Exception as error:
            assert any(status in str(error) for status in ("404", "422", "501")), error

    asyncio.run(all_of_it())


@check
def png_info_fails_only_by_the_key_that_the_client_does_not_know():
    try:
        client.png_info(made)
    except TypeError as error:
        assert "parameters" in str(error)


@check
def interrogation_without_a_picture_is_refused():
    # The client sends no body; the route has to exist.
    refused(client.interrogate, 404, 422, 501)


# LyCORIS files are among the LoRAs since A1111 1.5; the route of their own is gone.
assert client.get and client.post and client.base_url and client.timeout
finish(client, {"lycos", "alycos", "refresh_lycos", "arefresh_lycos"})
