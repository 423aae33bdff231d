"""sd-api-mcp 0.3.1: an MCP server in front of the API, driven through fastmcp's client. Needs Python 3.13 or newer."""

import asyncio
import os
import tempfile
from pathlib import Path

from checks import URL, check, failed, finish

os.environ["SD_WEBUI_URL"] = URL

from fastmcp import Client  # noqa: E402
from PIL import Image  # noqa: E402
from sd_api_mcp.server import mcp  # noqa: E402

directory = tempfile.mkdtemp()
called = set()


def tools(*calls):
    """Calls tools one after the other; their results as data."""

    async def run():
        async with Client(mcp) as client:
            results = []
            for name, arguments in calls:
                called.add(name)
                results.append((await client.call_tool(name, arguments)).data)
            return results

    return asyncio.run(run())


SMALL = {"prompt": "a red apple", "steps": 2, "width": 128, "height": 128, "seed": 1, "output_dir": directory}
made = tools(("txt2img", {**SMALL, "batch_size": 2}))[0]


@check
def pictures_are_made_and_changed():
    assert len(made) == 2 and Image.open(made[0]).size == (128, 128)
    mask = Path(directory, "mask.png")
    picture = Image.new("L", (128, 128), 0)
    picture.paste(255, (32, 32, 96, 96))
    picture.save(mask)
    changed, painted = tools(
        ("img2img", {**SMALL, "init_image": made[0]}), ("img2img", {**SMALL, "init_image": made[0], "mask": str(mask)}))
    assert Image.open(changed[0]).size == Image.open(painted[0]).size == (128, 128)


@check
def pictures_are_enlarged():
    (large,) = tools(("upscale_images", {"images": made, "upscaling_resize": 2, "upscaler_1": "Lanczos", "output_dir": directory}))
    assert [Image.open(path).size for path in large] == [(256, 256)] * 2


@check
def a_listed_checkpoint_is_chosen():
    models, upscalers = tools(("get_sd_models", {}), ("get_sd_upscalers", {}))
    assert models and upscalers[0] == "None"
    tools(("set_sd_model", {"model_name": models[0]}))


@check
def controlnet_lists():
    models, modules = tools(("get_controlnet_models", {}), ("get_controlnet_modules", {}))
    assert isinstance(models, list) and isinstance(modules, list)


async def offered():
    async with Client(mcp) as client:
        return {tool.name for tool in await client.list_tools()}


unused = asyncio.run(offered()) - called
if unused:
    failed.append(f"tools never called: {sorted(unused)}")
finish()
