"""What the modes share: A1111's conditioning, noise, guidance and sampler calls, on diffusers' and k-diffusion's parts."""
import functools
import io
import pathlib

import numpy as np
import torch
import zstandard
from PIL import Image
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load
from transformers import CLIPTokenizer

import planes
import tinymodel as T
from common import BETA_END, BETA_START, SCALE_FACTOR, VARIANTS, alphas_cumprod, gen, k_diffusion
from diffusion import AB
from make_sigmas import a1111_timesteps, schedule, wrapper

HERE = pathlib.Path(__file__).resolve().parent.parent
TINY = VARIANTS["public"]
TABLE = wrapper()
BASE = {"prompt": "a photo of a cat", "negative": "blurry, lowres", "seed": 1, "sampler": "Euler", "scheduler": "Automatic", "steps": 8,
        "cfg": 6.0, "width": 96, "height": 64, "batch": 1, "batches": 1, "tiling": False}


# ---------------------------------------------------------------- models
def unpack(name):
    return load(zstandard.ZstdDecompressor().decompress((HERE / name).read_bytes()))


def tiny_checkpoint():
    return load(planes.unpack((HERE / "tiny_sdxl.safetensors.planes.zst").read_bytes()))


def doubling(unet):
    """A1111 always doubles, convolves, then brings an odd size to its skip's by nearest neighbour; diffusers resizes first."""
    def forward(up, h, output_size=None, *_, **__):
        h = up.conv(torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h if output_size is None else torch.nn.functional.interpolate(h, size=output_size, mode="nearest")
    for block in unet.up_blocks:
        for up in block.upsamplers or ():
            up.forward = functools.partial(forward, up)
    return unet


class Model:
    """A checkpoint's networks, and how it turns texts and sizes into conditioning."""

    def __init__(self, sd, v=TINY):
        self.parts = T.load_own(sd, v)
        self.unet, self.vae = doubling(self.parts.unet), self.parts.vae

    def condition(self, tokens, size, negative):
        r = T.run_text(self.parts, *tokens)
        ids = [size[1], size[0], 0, 0, size[1], size[0]]
        return r["context"], r["pooled"], torch.tensor([ids], dtype=torch.float32)


class Texts:
    """Plain texts to conditioning: one chunk, no emphasis."""

    def __init__(self, clip_dir):
        d = pathlib.Path(clip_dir)
        self.clip = CLIPTokenizer(str(d / "vocab.json"), str(d / "merges.txt"))
        rows = tiny_checkpoint()[T.P_L + "text_model.embeddings.token_embedding.weight"]
        self.kept = rows.float().abs().sum(1) > 0

    def tokens(self, text):
        ids = self.clip(text, add_special_tokens=False)["input_ids"]
        assert len(ids) <= 75 and all(self.kept[i] for i in ids), f"a token of `{text}` is not in the tiny checkpoint"
        chunk = [49406, *ids, 49407]
        pad = 77 - len(chunk)
        return torch.tensor([chunk + [49407] * pad]), torch.tensor([chunk + [0] * pad])

    def encode(self, model, text, size, negative=False):
        context, pooled, ids = model.condition(self.tokens(text), size, negative)
        keep = 0.0 if negative and text == "" else 1.0
        return {"context": context * keep, "pooled": pooled * keep, "time_ids": ids}


def segments(text, calls):
    """`text`, or [[end, text], ...] as the prompt grammar gives it: the first that has not ended serves a call."""
    return [[calls, text]] if isinstance(text, str) else text


# ---------------------------------------------------------------- noise
def slerp(t, a, b):
    """Along the rows, per column and channel."""
    dot = (a / a.norm(dim=1, keepdim=True) * (b / b.norm(dim=1, keepdim=True))).sum(1)
    if dot.mean() > 0.9995:
        return a * t + b * (1 - t)
    w = torch.acos(dot)
    return (torch.sin((1 - t) * w) / torch.sin(w)).unsqueeze(1) * a + (torch.sin(t * w) / torch.sin(w)).unsqueeze(1) * b


class ImageNoise:
    """One generator per picture; variation and resizing act on the first draw only."""

    def __init__(self, shape, seeds, subseeds=(), strength=0.0, resize_from=None):
        self.shape, self.g, self.used = tuple(shape), [gen(s) for s in seeds], False
        self.seeds, self.subseeds, self.strength, self.resize_from = seeds, subseeds, strength, resize_from

    def next(self):
        if self.used:
            return torch.stack([torch.randn(self.shape, generator=g) for g in self.g])
        self.used = True
        return torch.stack([self.first(i) for i in range(len(self.g))])

    def first(self, i):
        shape = self.shape
        if self.resize_from:
            shape = (shape[0], self.resize_from[1] // 8, self.resize_from[0] // 8)
        noise = torch.randn(shape, generator=self.g[i] if shape == self.shape else gen(self.seeds[i]))
        if self.strength:
            noise = slerp(self.strength, noise, torch.randn(shape, generator=gen(self.subseeds[i])))
        if shape == self.shape:
            return noise
        x = torch.randn(self.shape, generator=self.g[i])
        dy, dx = (self.shape[1] - shape[1]) // 2, (self.shape[2] - shape[2]) // 2
        h, w = (n + 2 * min(d, 0) for n, d in zip(shape[1:], (dy, dx)))
        to_y, to_x, from_y, from_x = max(dy, 0), max(dx, 0), max(-dy, 0), max(-dx, 0)
        x[:, to_y:to_y + h, to_x:to_x + w] = noise[:, from_y:from_y + h, from_x:from_x + w]
        return x


# ---------------------------------------------------------------- guidance
class Denoiser:
    """A1111's CFG denoiser: picks conditioning by call, switches to a refiner, guides, blends with what a mask keeps."""

    def __init__(self, job, model, texts, prompts, size, cfg, calls, mask=None, extra=None, refiner=None):
        self.job, self.model, self.texts, self.prompts, self.size, self.cfg = job, model, texts, prompts, size, cfg
        self.calls, self.mask, self.extra, self.refiner, self.call = calls, mask, extra, refiner, 0
        self.encode()

    def encode(self):
        def all_of(text, negative):
            return [(end, self.texts.encode(self.model, t, self.size, negative)) for end, t in segments(text, self.calls)]
        self.positive, self.negative = all_of(self.prompts[0], False), all_of(self.prompts[1], True)

    def pick(self, conds):
        return next((c for end, c in conds if self.call <= end), conds[-1][1])

    def maybe_refine(self, timestep):
        if self.refiner and (999 - timestep) / 1000 >= self.refiner["switch_at"] and self.model is not self.refiner["model"]:
            self.model = self.refiner["model"]
            self.encode()

    def eps(self, x, t):
        """Cond and uncond noise of the UNet at timestep t."""
        n, out = x.shape[0], []
        for cond in (self.pick(self.positive), self.pick(self.negative)):
            batch = {k: v.expand(n, *v.shape[1:]) for k, v in cond.items()}
            inputs = x if self.extra is None else torch.cat([x, self.extra.expand(n, *self.extra.shape[1:])], 1)
            out.append(T.run_unet(self.model.unet, inputs, t, batch["context"], batch["pooled"], batch["time_ids"]))
        return out

    def __call__(self, x, sigma, **_):
        """Denoised latents for k-diffusion's samplers."""
        self.maybe_refine(int((TABLE.sigmas - sigma.max()).abs().argmin()))
        s = sigma.reshape(-1, 1, 1, 1)
        cond, uncond = (x - s * e for e in self.eps(x / (s ** 2 + 1).sqrt(), TABLE.sigma_to_t(sigma)))
        out = uncond + (cond - uncond) * self.cfg
        if self.mask:
            out = self.mask.blend(out, float(sigma[0]))
        self.call += 1
        return out

    def guided_eps(self, x, t):
        """Noise for the samplers that count in timesteps; what is kept goes in before the call."""
        self.maybe_refine(int(t))
        if self.mask:
            x = self.mask.blend(x, float(t))
        cond, uncond = self.eps(x, torch.full((x.shape[0],), float(t)))
        self.call += 1
        return uncond + (cond - uncond) * self.cfg


# ---------------------------------------------------------------- samplers
DEFAULT_SCHEDULER = {"DPM++ 2M": "Karras", "DPM++ SDE": "Karras", "DPM++ 2M SDE": "Exponential", "DPM++ 3M SDE": "Exponential",
                     "DPM2": "Karras", "DPM++ 2S a": "Karras"}
FUNCTION = {"Euler": "euler", "Euler a": "euler_ancestral", "DPM++ 2M": "dpmpp_2m", "DPM++ SDE": "dpmpp_sde", "DPM++ 2M SDE": "dpmpp_2m_sde",
            "DPM++ 3M SDE": "dpmpp_3m_sde", "Heun": "heun", "DPM2": "dpm_2", "DPM++ 2S a": "dpmpp_2s_ancestral", "LMS": "lms",
            "DPM fast": "dpm_fast", "DPM adaptive": "dpm_adaptive"}
SECOND_ORDER = {"DPM++ SDE", "Heun", "DPM2", "DPM++ 2S a"}
DISCARD = {"DPM++ 3M SDE", "DPM2"}
SCHEDULE = {"Automatic": "uniform", "Karras": "karras", "Exponential": "exponential", "SGM Uniform": "sgm_uniform", "Simple": "simple",
            "Align Your Steps": "align_your_steps", "KL Optimal": "kl_optimal", "Beta": "beta", "DDIM": "ddim"}


def expected_calls(sampler, steps):
    return steps * (2 if sampler in SECOND_ORDER else 1)


def sigmas_of(sampler, scheduler, steps):
    name = DEFAULT_SCHEDULER.get(sampler, scheduler) if scheduler == "Automatic" else scheduler
    if sampler in DISCARD:
        s = schedule(SCHEDULE[name], steps + 1)
        return torch.cat([s[:-2], s[-1:]])
    return schedule(SCHEDULE[name], steps)


def image_steps(steps, strength, exact):
    """Steps of the whole schedule, and how many of its levels are left to walk, less one."""
    strength = min(strength, 0.999)
    if exact:
        return (int(steps / strength) if strength > 0 else 0), steps - 1
    return steps, int(strength * steps)


def sample(job, denoiser, noise, first, image=None):
    """`job` gives sampler, scheduler and steps; `image` is (latents, strength, exact) where a picture is started from."""
    name = job["sampler"]
    steps, t_enc = (job["steps"], None) if image is None else image_steps(job["steps"], image[1], image[2])
    if name in ("DDIM", "PLMS", "UniPC"):
        return by_timesteps(name, denoiser, first, steps, t_enc, image)
    kd = k_diffusion().sampling
    whole = sigmas_of(name, job["scheduler"], steps)
    sigmas = whole if image is None else whole[steps - t_enc - 1:]
    x = first * sigmas[0] + (0 if image is None else image[0] + first * job.get("extra_noise", 0.0))
    kw = {"disable": True}
    if "SDE" in name:
        seeds = noise.seeds
        kw["noise_sampler"] = kd.BrownianTreeNoiseSampler(x, whole[whole > 0].min(), whole.max(), seed=seeds)
    elif name in ("Euler a", "DPM++ 2S a", "DPM fast", "DPM adaptive"):
        kw["noise_sampler"] = lambda a, b: noise.next()
    if name in ("DPM fast", "DPM adaptive"):
        lo, hi = (TABLE.sigmas[0], TABLE.sigmas[-1]) if image is None else (sigmas[-2], sigmas[0])
        kw.update(sigma_min=lo, sigma_max=hi, eta=1.0)
        if name == "DPM fast":
            kw["n"] = steps if image is None else len(sigmas) - 1
    else:
        kw["sigmas"] = sigmas
    return getattr(kd, "sample_" + FUNCTION[name])(denoiser, x, **kw)


def by_timesteps(name, denoiser, first, steps, t_enc, image):
    """From a picture it starts at the level of timestep `t_enc` but walks only those before it."""
    ts, x = a1111_timesteps(steps), first
    if image is not None:
        level = alphas_cumprod().double()[ts[t_enc]]
        x = image[0] * level.sqrt().float() + first * (1 - level).sqrt().float()
        ts = ts[:t_enc]
    if name == "UniPC":
        return unipc(denoiser, x, len(ts), 1.0 if image is None else ts[-1] / 1000 + 1 / 1000)
    return (ddim if name == "DDIM" else plms)(denoiser, x, ts)


def moved(x, e, now, then):
    """DDIM's step with eta 0, from one cumulative alpha to another."""
    clean = (x - (1 - now).sqrt().float() * e) / now.sqrt().float()
    return then.sqrt().float() * clean + (1 - then).sqrt().float() * e


def ddim(denoiser, x, ts):
    a = alphas_cumprod().double()
    for i in range(len(ts) - 1, 0, -1):
        x = moved(x, denoiser.guided_eps(x, ts[i]), a[ts[i]], a[ts[i - 1]])
    return x


def plms(denoiser, x, ts):
    a, before = alphas_cumprod().double(), []
    for i in range(len(ts) - 1, 0, -1):
        e = denoiser.guided_eps(x, ts[i])
        if before:
            mean = sum(c * h for c, h in zip(AB[len(before) + 1], [e, *before]))
        else:
            mean = (e + denoiser.guided_eps(moved(x, e, a[ts[i]], a[ts[i - 1]]), ts[i - 1])) / 2
        before = [e, *before][:3]
        x = moved(x, mean, a[ts[i]], a[ts[i - 1]])
    return x


def unipc(denoiser, x, steps, start):
    """diffusers' solver (bh1, order 3) on A1111's grid: continuous time, log alpha between its nodes by straight lines."""
    t = np.linspace(start, 1 / 1000, steps + 1)
    alpha = np.exp(np.interp(t, np.linspace(0, 1, 1001)[1:], 0.5 * torch.log(alphas_cumprod().double()).numpy()))
    solver = UniPCMultistepScheduler(beta_start=BETA_START, beta_end=BETA_END, beta_schedule="scaled_linear", solver_order=3,
                                     solver_type="bh1", predict_x0=True, lower_order_final=True, prediction_type="epsilon")
    solver.set_timesteps(steps)
    solver.sigmas, solver.timesteps = torch.tensor(np.sqrt(1 - alpha ** 2) / alpha).float(), torch.tensor((t[:-1] - 1 / 1000) * 1000)
    solver._step_index = 0
    for t in solver.timesteps:
        x = solver.step(denoiser.guided_eps(x, float(t)), t, x, return_dict=False)[0]
    return x


# ---------------------------------------------------------------- pictures
def encode_picture(vae, planes):
    """[B, 3, H, W] in -1..1 to latents: the mean of the posterior, where A1111 draws from it."""
    return torch.cat([vae.encode(p[None]).latent_dist.mean for p in planes]) * SCALE_FACTOR


def to_planes(picture):
    return torch.from_numpy(np.moveaxis(np.asarray(picture.convert("RGB")).astype(np.float32) / 255, 2, 0))


def decode(vae, latents):
    """Latents to pictures: 255 times the clamped value, cut off."""
    out = []
    for z in latents:
        v = ((vae.decode(z[None] / SCALE_FACTOR).sample[0] + 1) / 2).clamp(0, 1)
        out.append(Image.fromarray((255 * v.permute(1, 2, 0).numpy()).astype(np.uint8)))
    return out


def png(picture):
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def resize(picture, mode, width, height):
    """A1111's `resize_image` without an upscaler."""
    lanczos = Image.Resampling.LANCZOS
    if mode == 0:
        return picture.resize((width, height), lanczos)
    ratio, own = width / height, picture.width / picture.height
    fills_width, fills_height = (ratio > own, ratio <= own) if mode == 1 else (ratio < own, ratio >= own)
    w = width if fills_width else picture.width * height // picture.height
    h = height if fills_height else picture.height * width // picture.width
    resized = picture.resize((w, h), lanczos)
    out = Image.new("RGB", (width, height))
    x, y = width // 2 - w // 2, height // 2 - h // 2
    out.paste(resized, (x, y))
    # The edges go on: Pillow enlarges a box without area by the two rows or columns at it.
    if mode == 2 and ratio < own and y > 0:
        out.paste(resized.resize((width, y), box=(0, 0, width, 0)), (0, 0))
        out.paste(resized.resize((width, y), box=(0, h, width, h)), (0, y + h))
    elif mode == 2 and ratio > own and x > 0:
        out.paste(resized.resize((x, height), box=(0, 0, 0, height)), (0, 0))
        out.paste(resized.resize((x, height), box=(w, 0, w, height)), (x + w, 0))
    return out
