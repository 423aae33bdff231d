"""The parts of a job in PyTorch: diffusers' UNet and VAE on a checkpoint's weights, transformers' text towers on random ones.

    python pytorch.py --checkpoint FILE --scale sdxl|demo --width 512 --height 512 --steps 2 [--threads 2] [--dtype bf16]

The peer of `sdgen bench`: channels last, `inference_mode`, diffusers' fused attention, both halves of the guidance in one batch.
Prints one JSON object a part, then one with the peak memory. diffusers computes the keys and values of the text in every step.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

# Widths of the levels, depth of their transformers, text towers (width, layers), VAE widths and blocks a level.
SCALES = {
    "sdxl": dict(widths=(320, 640, 1280), depths=(0, 2, 10), l=(768, 12), g=(1280, 32), vae=(128, 256, 512, 512), vae_blocks=2),
    "demo": dict(widths=(64, 128, 128), depths=(0, 1, 1), l=(64, 3), g=(64, 3), vae=(32, 32, 64, 128), vae_blocks=1),
}


def unet_config(s):
    attends = [depth > 0 for depth in s["depths"]]
    return dict(
        _class_name="UNet2DConditionModel", in_channels=4, out_channels=4, block_out_channels=s["widths"], layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        transformer_layers_per_block=[max(depth, 1) for depth in s["depths"]],
        attention_head_dim=[width // 64 for width in s["widths"]],  # in spite of its name the number of heads
        cross_attention_dim=s["l"][0] + s["g"][0], use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=s["g"][0] + 6 * 256,
    )  # fmt: skip


def vae_config(s):
    levels = len(s["vae"])
    return dict(
        _class_name="AutoencoderKL", latent_channels=4, block_out_channels=s["vae"], layers_per_block=s["vae_blocks"],
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, scaling_factor=0.13025,
    )  # fmt: skip


def from_checkpoint(kind, config, path, dtype):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        module = kind.from_single_file(path, config=folder, torch_dtype=dtype, local_files_only=True)
    return module.eval().to(memory_format=torch.channels_last)


def text_tower(kind, size, activation, dtype):
    width, layers = size
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=max(width // 64, 1),
        hidden_act=activation, projection_dim=width, eos_token_id=49407,
    )  # fmt: skip
    return kind(config).eval().to(dtype)


def timed(name, work):
    start = time.perf_counter()
    value = work()
    print(json.dumps({"part": name, "seconds": time.perf_counter() - start}), flush=True)
    return value


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--checkpoint", required=True)
    arguments.add_argument("--scale", choices=SCALES, default="sdxl")
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--height", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    dtype, scale = {"f32": torch.float32, "bf16": torch.bfloat16}[a.dtype], SCALES[a.scale]
    # Starts the thread pool and the libraries, which is not what is measured.
    torch.nn.functional.conv2d(torch.ones(1, 64, 32, 32), torch.ones(64, 64, 3, 3)), torch.ones(512, 512) @ torch.ones(512, 512)

    with torch.inference_mode():
        l = text_tower(CLIPTextModel, scale["l"], "quick_gelu", dtype)
        g = text_tower(CLIPTextModelWithProjection, scale["g"], "gelu", dtype)
        unet = timed("load unet", lambda: from_checkpoint(UNet2DConditionModel, unet_config(scale), a.checkpoint, dtype))
        vae = timed("load vae", lambda: from_checkpoint(AutoencoderKL, vae_config(scale), a.checkpoint, dtype))
        ids = torch.tensor([[49406, *range(301, 313)] + [49407] * 64, [49406] + [49407] * 76])
        towers = timed("text", lambda: [tower(ids, output_hidden_states=True) for tower in (l, g)])
        context = torch.cat([tower.hidden_states[-2] for tower in towers], -1)
        added = {"text_embeds": towers[1].text_embeds, "time_ids": torch.zeros(2, 6, dtype=dtype)}
        x = torch.randn(2, 4, a.height // 8, a.width // 8).to(dtype, memory_format=torch.channels_last)
        for step in range(1, a.steps + 1):
            t = torch.tensor(999.0 * (1.0 - step / (a.steps + 1)))
            eps = timed(
                f"step {step} (batch of 2)",
                lambda: unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0],
            )
            x = x - eps * 0.1
        picture = timed("decode", lambda: vae.decode(x[:1], return_dict=False)[0])
        assert picture.shape == (1, 3, a.height, a.width) and picture.isfinite().all()
    print(json.dumps({"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))


if __name__ == "__main__":
    main()
