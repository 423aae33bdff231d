"""Complete txt2img cases with A1111 semantics: latents, decoded floats, PNG and the exact recipe."""
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import diffusion as D
import make_text
import make_tokens
import tinymodel as T
from common import *  # noqa: F401,F403
from make_sigmas import schedule, a1111_timesteps

CASES = {
    "public": [
        dict(name="euler_a", prompt="a photo of a cat", negative="blurry, lowres", seeds=[12345], sampler="euler_ancestral",
             schedule="uniform", steps=8, cfg=7.0, width=128, height=128),
        dict(name="dpmpp_2m_karras", prompt="RAW photo, portrait, soft lighting", negative="", seeds=[42], sampler="dpmpp_2m",
             schedule="karras", steps=10, cfg=5.0, width=64, height=96),
        dict(name="dpmpp_sde_karras", prompt="masterpiece, best quality, castle at night", negative="bad anatomy, text", seeds=[1],
             sampler="dpmpp_sde", schedule="karras", steps=6, cfg=6.5, width=96, height=64),
        dict(name="dpmpp_2m_sde_exp_batch2", prompt="日本の城、桜", negative="worst quality", seeds=[2 ** 32 - 2, 2 ** 32 - 1],
             sampler="dpmpp_2m_sde", schedule="exponential", steps=7, cfg=4.0, width=128, height=64),
        dict(name="ddim", prompt="a photo of a dog, snow", negative="lowres", seeds=[7], sampler="ddim", schedule=None, steps=10,
             cfg=7.0, width=96, height=96),
    ],
}


class SeededNoise:
    """One CPU generator per image: the initial noise first, then one more draw per sampler request."""

    def __init__(self, seeds, shape):
        self.g, self.shape, self.log = [gen(s) for s in seeds], shape, []

    def next(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.g])

    def __call__(self, a, b):
        self.log.append(self.next())
        return self.log[-1]


def sample(c, f, zero_step_noise=None):
    kd = k_diffusion().sampling
    h, w = c["height"] // 8, c["width"] // 8
    noise = SeededNoise(c["seeds"], (4, h, w))
    x0 = noise.next()
    if c["sampler"] == "ddim":
        r, xs = D.ddim(f, x0, c["steps"], 0.0, noise)
        return r, x0, None, xs, []
    sig = schedule(c["schedule"], c["steps"])
    xs, used = [], []
    kw = {"disable": True, "callback": lambda d: xs.append(d["x"].clone())}
    if "ancestral" in c["sampler"]:
        kw["noise_sampler"] = noise
        used = noise.log
    elif "sde" in c["sampler"]:
        bt = kd.BrownianTreeNoiseSampler(x0, sig[sig > 0].min(), sig.max(), seed=c["seeds"])

        def ns(a, b):
            used.append(bt(a, b))
            return used[-1]
        kw["noise_sampler"] = ns
    r = getattr(kd, "sample_" + c["sampler"])(f, x0 * sig[0], sig, **kw)
    return r, x0, sig, xs, used


def to_png(dec, path):
    a = ((dec + 1) / 2).clamp(0, 1)
    arr = (255.0 * a.permute(1, 2, 0).numpy()).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(arr).save(path)


def main(v, out):
    sd = load_file(str(out / "tiny_sdxl.safetensors"))
    m, dif = T.load_own(sd, v), T.load_by_diffusers(sd, v)
    toks = make_tokens.tokenizers(v["clip_dir"])
    recipes, worst, sens = [], 0.0, 0.0
    for c in CASES[v["name"]]:
        tens = {}

        def cond(mm, text, zero=False):
            r = make_text.encode_plain(mm, v, toks, text)
            hw = (c["height"], c["width"])
            _, ids = T.vector_cond(r["pooled"], hw, (0, 0), hw)
            k = 0.0 if zero else 1.0
            return {"context": r["context"] * k, "pooled": r["pooled"] * k, "time_ids": ids[None]}

        variants = {"": False}
        if c["negative"] == "":
            variants["zeroed."] = True
        for pre, zero in variants.items():
            pos, neg = cond(m, c["prompt"]), cond(m, c["negative"], zero)
            r, x0, sig, xs, used = sample(c, D.CFG(m.unet, pos, neg, c["cfg"]))
            dec = m.vae.decode(r / SCALE_FACTOR).sample
            tens[pre + "latents"], tens[pre + "decoded"] = r, dec
            if not pre:
                hw = (c["height"], c["width"])
                tens.update({"initial_noise": x0, "xs": torch.stack(xs), "cond.context": pos["context"], "uncond.context": neg["context"],
                             "cond.y": T.vector_cond(pos["pooled"], hw, (0, 0), hw)[0],
                             "uncond.y": T.vector_cond(neg["pooled"], hw, (0, 0), hw)[0]})
                if sig is not None:
                    tens["sigmas"] = sig
                if used:
                    tens["step_noise"] = torch.stack(used)
                # second path: modules loaded by diffusers' converters, sdpa attention
                r2, *_ = sample(c, D.CFG(dif.unet, cond(dif, c["prompt"]), cond(dif, c["negative"], zero), c["cfg"]))
                d2 = dif.vae.decode(r2 / SCALE_FACTOR).sample
                lat_rel = maxdiff(r, r2) / float(r.abs().max())
                worst = max(worst, lat_rel, maxdiff(dec, d2))
            for i in range(r.shape[0]):
                nm = f"{c['name']}{'.' + pre.rstrip('.') if pre else ''}{'.' + str(i) if r.shape[0] > 1 else ''}.png"
                to_png(dec[i], out / "e2e" / nm)
        save_st(out / f"e2e/{c['name']}.safetensors", tens)
        rec = dict(c, latents_std=float(r.std()), decoded_absmax=float(tens["decoded"].abs().max()), tensors=sorted(tens))
        if c["sampler"] == "ddim":
            rec["timesteps_descending"] = list(reversed(a1111_timesteps(c["steps"])))
        recipes.append(rec)
    report("latents (relative to max) and decoded: own-mapped vs diffusers-converted modules, worst", worst)
    save_json(out / "e2e/e2e.json", {"cases": recipes, "recipe": [
        "prompts tokenised plainly (no emphasis syntax), one 75-token chunk; L padded with 49407, G with 0",
        "context = concat(L penultimate, G penultimate); y = pooled + embed(orig h,w; crop 0,0; target h,w), orig = target = (height,width)",
        "the same y sizes for cond and uncond; the empty negative is encoded as an empty prompt; tensors 'zeroed.*' instead set uncond "
        "context and pooled to zero and keep the size part, which is what A1111 does for SDXL when every negative in the batch is ''",
        "noise: one torch CPU generator per image, manual_seed(seed); first randn((4,h/8,w/8)) is the initial noise",
        "k-diffusion samplers: x = noise*sigmas[0] (not sqrt(1+sigma^2), which is a non-default option); DDIM: x = noise as is",
        "ancestral samplers: each noise request takes the next randn((4,h/8,w/8)) of each image's generator",
        "sde samplers: BrownianTree per image with seed = image seed, from smallest nonzero sigma to largest (see brownian.json)",
        "each model call: [cond, uncond] batch, input x/sqrt(1+sigma^2), t = log-sigma interpolation, not rounded; denoised = x - sigma*eps; "
        "denoised = uncond + cfg*(cond - uncond)",
        "decode(latents/0.13025); PNG = uint8(truncate(255*clamp((d+1)/2,0,1))): allow +-1 per channel value",
        "schedule 'uniform' is A1111's 'Automatic' for Euler a; step noise and per-step x are stored to localise a difference"]})
