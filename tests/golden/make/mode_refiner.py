"""A tiny refiner checkpoint in the published layout: one text encoder (bigG), four levels, size and aesthetic score in the vector."""
import pathlib

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load, save
from transformers import CLIPTextModelWithProjection

import planes
import tinymodel as T
from common import VARIANTS, gen
from mode_parts import doubling

SEED, PREFIX = 20240602, "conditioner.embedders.0.model."
FILE = "tiny_refiner.safetensors.planes.zst"
HIGH, LOW = 6.0, 2.5
TINY = VARIANTS["public"]
REFINER = {
    "unet": {**TINY["unet"], "channel_mult": [1, 1, 1, 1], "transformer_depth": [0, 1, 1, 0], "transformer_depth_middle": 1, "context_dim": 48,
             "adm_in_channels": 48 + 5 * 256},
    "vae": {**TINY["vae"], "ch_mult": [1, 1, 1, 1]},
    "text_g": {**TINY["text_g"], "num_layers": 3},
}


def shapes(v):
    out = {}
    unet = UNet2DConditionModel(**T.unet_diffusers_config(v["unet"]))
    for k, p in T.remap(unet.state_dict(), {b: a for a, b in T.unet_key_map(v["unet"]).items()}).items():
        out[T.P_UNET + k] = tuple(p.shape)
    vae = AutoencoderKL(**T.vae_diffusers_config(v["vae"]))
    for k, p in T.remap(vae.state_dict(), {b: a for a, b in T.vae_key_map(v["vae"]).items()}).items():
        out[T.P_VAE + k] = tuple(p.shape) + ((1, 1) if ".attn_1." in k and p.ndim == 2 else ())
    whole = {**TINY, "text_g": v["text_g"]}
    for k, s in T.checkpoint_shapes(whole).items():
        if k.startswith(T.P_G):
            out[PREFIX + k[len(T.P_G):]] = s
    return out


def build(kept):
    """Seeded weights; rows of unused tokens are zero, as in the tiny base."""
    g = gen(SEED)
    sd = {k: T.random_like(k, s, g) for k, s in sorted(shapes(REFINER).items())}
    T.add_identity_path(sd, REFINER)
    sd = {k: (t.half().view(torch.int16) & ~0x1F).view(torch.float16) for k, t in sd.items()}  # half the mantissa, to pack well
    sd[PREFIX + "token_embedding.weight"][~kept] = 0
    return sd


def write(out, kept):
    """Writes the file unless it is there: safetensors does not order its metadata."""
    if (pathlib.Path(out) / FILE).exists():
        return
    packed = save(build(kept), {"format": "pt", "modelspec.resolution": "128x128", "sdgen.head_dim": "16"})
    (pathlib.Path(out) / FILE).write_bytes(planes.pack(packed))


class RefinerModel:
    """The checkpoint's networks and its conditioning: bigG's penultimate states, pooled, five numbers."""

    def __init__(self, out):
        sd = T.f32(load(planes.unpack((pathlib.Path(out) / FILE).read_bytes())))
        self.unet = UNet2DConditionModel(**T.unet_diffusers_config(REFINER["unet"])).eval()
        self.unet.load_state_dict(T.remap(T.sub(sd, T.P_UNET), T.unet_key_map(REFINER["unet"])), strict=True)
        doubling(self.unet)
        self.vae = AutoencoderKL(**T.vae_diffusers_config(REFINER["vae"])).eval()
        vae = T.remap(T.sub(sd, T.P_VAE), T.vae_key_map(REFINER["vae"]))
        self.vae.load_state_dict({k: t[:, :, 0, 0] if "attentions" in k and t.ndim == 4 else t for k, t in vae.items()}, strict=True)
        self.text = CLIPTextModelWithProjection(T.clip_config(REFINER["text_g"])).eval()
        self.text.load_state_dict(T.open_clip_to_hf(T.sub(sd, PREFIX)), strict=True)

    def condition(self, tokens, size, negative):
        g = self.text(tokens[1], output_hidden_states=True)
        ids = [size[1], size[0], 0, 0, LOW if negative else HIGH]
        return g.hidden_states[-2], g.text_embeds, torch.tensor([ids], dtype=torch.float32)
