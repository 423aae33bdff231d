"""Shared helpers: the variant, safetensors/json output, k-diffusion import without its training extras."""
import importlib.util
import json
import os
import pathlib
import sys
import types

import torch
from safetensors.torch import save_file

torch.set_num_threads(int(os.environ.get("GOLDEN_THREADS", "2")))
torch.set_grad_enabled(False)

VARIANTS = {
    "public": {
        "seed": 20240601,
        "unet": {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2, 2],
                 "num_res_blocks": 2, "transformer_depth": [0, 1, 2], "transformer_depth_middle": 2,
                 "num_head_channels": 16, "context_dim": 80, "adm_in_channels": 48 + 6 * 256,
                 "use_linear_in_transformer": True, "norm_num_groups": 32, "resblock_norm_eps": 1e-5,
                 "transformer_group_norm_eps": 1e-6, "layer_norm_eps": 1e-5},
        "vae": {"in_channels": 3, "out_channels": 3, "z_channels": 4, "ch": 32, "ch_mult": [1, 1, 2, 1],
                "num_res_blocks": 2, "norm_num_groups": 32, "norm_eps": 1e-6},
        "text_l": {"hidden_size": 32, "num_heads": 2, "num_layers": 4, "intermediate_size": 128,
                   "activation": "quick_gelu", "pad_token_id": 49407},
        "text_g": {"hidden_size": 48, "num_heads": 3, "num_layers": 5, "intermediate_size": 192,
                   "activation": "gelu", "projection_dim": 48, "pad_token_id": 0},
        "extra_keys": False,
        "latents": [(1, 16, 16), (2, 8, 24), (1, 12, 20)],
        "unet_t": [[999.0], [481.375, 13.0], [0.0]],
        "vae_px": [(64, 64), (48, 96)],
        "text_seed": 11,
    },
}

BETA_START, BETA_END, NUM_T, SCALE_FACTOR = 0.00085, 0.012, 1000, 0.13025


def k_diffusion():
    """Import k_diffusion.{utils,sampling,external} only: the package __init__ pulls training-only deps."""
    if "k_diffusion" not in sys.modules:
        spec = importlib.util.find_spec("k_diffusion")
        pkg = types.ModuleType("k_diffusion")
        pkg.__spec__ = spec
        pkg.__path__ = [str(pathlib.Path(spec.origin).parent)]
        sys.modules["k_diffusion"] = pkg
        for sub in ("utils", "sampling", "external"):
            setattr(pkg, sub, importlib.import_module(f"k_diffusion.{sub}"))
    return sys.modules["k_diffusion"]


def gen(seed):
    return torch.Generator("cpu").manual_seed(int(seed))


def save_st(path, tensors, meta=None):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous().clone() for k, v in sorted(tensors.items())}
    save_file(tensors, str(path), metadata={k: str(v) for k, v in (meta or {"format": "pt"}).items()})
    path.chmod(0o644)


def save_json(path, obj):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj, indent=1, ensure_ascii=False, default=float) + "\n", encoding="utf-8")


def alphas_cumprod():
    """LDM 'linear' (= diffusers 'scaled_linear') schedule in float64, then cast to float32, as sgm's
    LegacyDDPMDiscretization followed by the server-side float32 cast does."""
    betas = torch.linspace(BETA_START ** 0.5, BETA_END ** 0.5, NUM_T, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).to(torch.float32)


def maxdiff(a, b):
    return float((a.double() - b.double()).abs().max())


REPORT = {}


def report(key, value):
    REPORT[key] = value
    print(f"  [check] {key}: {value}", flush=True)
