"""Drives a server with the openai package 3.57.0. SDGEN_BASE_URL names the server, SDGEN_TOKEN is its bearer token."""

import base64
import io
import os
import urllib.request

import openai
from PIL import Image

base = os.environ["SDGEN_BASE_URL"].rstrip("/")
client = openai.OpenAI(base_url=base + "/v1", api_key=os.environ["SDGEN_TOKEN"], max_retries=0)


def picture(data):
    return Image.open(io.BytesIO(data))


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    out.seek(0)
    out.name = "picture.png"
    return out


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


models = list(client.models.list())
assert models and all(model.object == "model" for model in models), models
one = client.models.retrieve(models[0].id)
assert one.id == models[0].id and client.models.retrieve("dall-e-3").id == "dall-e-3"
missing = refused(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
assert missing.code == "model_not_found" and missing.param == "model", missing

made = client.images.generate(prompt="a red apple", model=models[0].id, n=2, size="64x64", quality="low")
assert len(made.data) == 2 and made.created > 1_700_000_000
for item in made.data:
    # Without credentials: the address is the permission.
    with urllib.request.urlopen(item.url) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert picture(answer.read()).size == (64, 64)
made = client.images.generate(
    prompt="a red apple", model="gpt-image-1", size="auto", quality="low", output_format="jpeg", output_compression=70)
result = picture(base64.b64decode(made.data[0].b64_json))
assert result.format == "JPEG" and result.size == (128, 128), result
assert made.output_format == "jpeg" and made.size == "128x128", made

start = Image.new("RGB", (128, 128), (200, 30, 30))
hole = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
hole.paste((0, 0, 0, 0), (64, 0, 128, 128))
edited = client.images.edit(
    image=png(start), mask=png(hole), prompt="a green leaf", n=1, size="128x128", response_format="b64_json", quality="low")
edited = picture(base64.b64decode(edited.data[0].b64_json)).convert("RGB")
assert edited.size == (128, 128)
assert edited.getpixel((10, 64)) == (200, 30, 30), edited.getpixel((10, 64))
assert edited.crop((80, 0, 128, 128)).tobytes() != start.crop((80, 0, 128, 128)).tobytes()
clear = start.convert("RGBA")
clear.paste((0, 0, 0, 0), (64, 0, 128, 128))
edited = client.images.edit(image=png(clear), prompt="a leaf", response_format="b64_json", quality="low")
assert picture(base64.b64decode(edited.data[0].b64_json)).size == (128, 128)
varied = client.images.create_variation(image=png(start), n=1, size="64x64", response_format="b64_json")
assert picture(base64.b64decode(varied.data[0].b64_json)).size == (64, 64)

for field, arguments in {
    "prompt": {"prompt": ""},
    "size": {"prompt": "a", "size": "7x7"},
    "n": {"prompt": "a", "n": 11},
    "quality": {"prompt": "a", "quality": "best"},
    "response_format": {"prompt": "a", "response_format": "gif"},
    "background": {"prompt": "a", "background": "transparent"},
}.items():
    error = refused(openai.BadRequestError, lambda: client.images.generate(**arguments))
    assert error.param == field and error.type == "invalid_request_error", (field, error)
error = refused(openai.BadRequestError, lambda: client.images.edit(image=png(start), mask=png(start), prompt="a"))
assert error.param == "mask", error
refused(openai.NotFoundError, lambda: client.images.generate(prompt="a", model="sdxl-nobody-has"))
stranger = openai.OpenAI(base_url=base + "/v1", api_key="wrong-token", max_retries=0)
assert refused(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
print("openai", openai.VERSION, "drove models, generate, edit and variation")
