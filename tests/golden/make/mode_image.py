"""Image to image and inpainting, as `StableDiffusionProcessingImg2Img` of A1111 prepares, samples and finishes them."""
import cv2
import numpy as np
import torch
from blendmodes.blend import BlendType, blendLayers
from PIL import Image, ImageChops, ImageFilter
from skimage import exposure

import mode_soft
from mode_parts import (Denoiser, ImageNoise, decode, encode_picture, expected_calls, resize, sample, to_planes)


class Kept:
    """What a mask keeps: 1 in `paint` is painted anew."""

    def __init__(self, paint, init, soft):
        self.paint, self.init, self.soft = paint, init, soft

    def blend(self, x, sigma):
        if self.soft:
            return mode_soft.blend(self.soft, self.init, x, self.paint, sigma)
        return x * self.paint + self.init * (1 - self.paint)

    def final(self, x):
        return x if self.soft else x * self.paint + self.init * (1 - self.paint)


# ---------------------------------------------------------------- masks
def blurred(mask, across, down):
    a = np.array(mask)
    for sigma, size in ((across, lambda k: (k, 1)), (down, lambda k: (1, k))):
        if sigma > 0:
            a = cv2.GaussianBlur(a, size(2 * int(2.5 * sigma + 0.5) + 1), sigma)
    return Image.fromarray(a)


def widened(lo, hi, more, limit):
    lo, hi = lo - more // 2, hi + more - more // 2
    if hi >= limit:
        lo, hi = lo - (hi - limit), limit
    if lo < 0:
        lo, hi = 0, hi - lo
    return lo, min(hi, limit)


def crop_region(mask, padding, width, height):
    """The box around the mask, padded, then widened to the job's shape."""
    box = mask.getbbox()
    if box is None:
        return None
    x1, y1, x2, y2 = max(box[0] - padding, 0), max(box[1] - padding, 0), min(box[2] + padding, mask.width), min(box[3] + padding, mask.height)
    w, h, ratio = x2 - x1, y2 - y1, width / height
    if w / h > ratio:
        y1, y2 = widened(y1, y2, int(w / ratio - h), mask.height)
    else:
        x1, x2 = widened(x1, x2, int(h * ratio - w), mask.width)
    return x1, y1, x2, y2


def uncovered(picture, mask):
    """The picture where the mask is not, colours multiplied by what is left."""
    out = Image.new("RGBa", picture.size)
    out.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageChops.invert(mask.convert("L")))
    return out


def filled(picture, mask):
    """The masked part made of the colours around it: ever less blurred layers over one another."""
    outside, out = uncovered(picture, mask), Image.new("RGBA", picture.size)
    for radius, times in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        layer = outside.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            out.alpha_composite(layer)
    return out.convert("RGB")


# ---------------------------------------------------------------- after decoding
def lab(picture):
    return cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2LAB)


def color_corrected(reference, picture):
    matched = exposure.match_histograms(lab(picture), reference, channel_axis=2)
    matched = Image.fromarray(cv2.cvtColor(matched, cv2.COLOR_LAB2RGB).astype("uint8"))
    return blendLayers(matched, picture, BlendType.LUMINOSITY).convert("RGB")


def uncropped(picture, size, region):
    out = Image.new("RGBA", size)
    out.paste(resize(picture, 1, region[2] - region[0], region[3] - region[1]), region[:2])
    return out


def overlaid(picture, overlay, region):
    if region:
        picture = uncropped(picture, overlay.size, region)
    out = picture.convert("RGBA")
    out.alpha_composite(overlay)
    return out.convert("RGB")


# ---------------------------------------------------------------- a run
class Start:
    """Mask and pictures made ready: latents, what is kept, what an inpainting checkpoint is shown, what finishes the result."""

    def __init__(self, job, model, pictures, mask_picture, noise_of):
        self.i2i, self.size = job["img2img"], (job["width"], job["height"])
        self.mask_of = self.i2i.get("mask")
        self.region = self.mask = self.kept = self.extra = None
        if self.mask_of:
            self.prepare_mask(mask_picture)
        self.colors, self.overlays, self.sources = [], [], pictures
        ready = [self.prepare(p) for p in pictures]
        planes = torch.stack([to_planes(p) for p in ready]) * 2 - 1
        if len(ready) == 1:
            planes = planes.repeat(job["batch"], 1, 1, 1)
            self.colors, self.overlays, self.sources = self.colors * job["batch"], self.overlays * job["batch"], pictures * job["batch"]
        self.latents = encode_picture(model.vae, planes)
        h, w = job["height"] // 8, job["width"] // 8
        if self.i2i["resize_mode"] == 3:
            self.latents = torch.nn.functional.interpolate(self.latents, size=(h, w), mode="bilinear")
        if self.mask:
            self.keep(noise_of, h, w)
        if model.unet.config.in_channels == 9:
            self.extra = self.shown(model, planes, h, w)

    def prepare_mask(self, picture):
        m = self.mask_of
        mask = picture.convert("L")
        if m["invert"]:
            mask = ImageChops.invert(mask)
        mask = blurred(mask, *m["blur"])
        if m["area"] == "only masked":
            self.region = crop_region(mask, m["padding"], *self.size)
            if self.region is None:
                self.mask_of = None
                return
            self.for_overlay, self.mask = mask, resize(mask.crop(self.region), 2, *self.size)
        else:
            self.mask = resize(mask, self.i2i["resize_mode"], *self.size)
            self.for_overlay = Image.fromarray(np.clip(np.array(self.mask).astype(np.float32) * 2, 0, 255).astype(np.uint8))

    def prepare(self, picture):
        picture = picture.convert("RGB")
        if self.region is None and self.i2i["resize_mode"] != 3:
            picture = resize(picture, self.i2i["resize_mode"], *self.size)
        if self.mask:
            self.overlays.append(uncovered(picture, self.for_overlay).convert("RGBA"))
        if self.region:
            picture = resize(picture.crop(self.region), 2, *self.size)
        if self.mask and self.mask_of["fill"] != 1:
            picture = filled(picture, self.mask)
        if self.i2i.get("color_correction"):
            self.colors.append(lab(picture))
        return picture

    def keep(self, noise_of, h, w):
        plane = np.asarray(self.mask.convert("RGB").resize((w, h))).astype(np.float32)[:, :, 0] / 255
        paint = torch.from_numpy(plane if self.mask_of.get("soft") else np.around(plane)).expand(4, h, w)
        if self.mask_of["fill"] == 2:
            self.latents = self.latents * (1 - paint) + noise_of(self.latents.shape[0]) * paint
        elif self.mask_of["fill"] == 3:
            self.latents = self.latents * (1 - paint)
        self.kept = Kept(paint, self.latents, self.mask_of.get("soft"))

    def shown(self, model, planes, h, w):
        """The five further channels of an inpainting checkpoint."""
        mask = torch.ones(1, 1, *planes.shape[-2:])
        if self.mask:
            mask = torch.from_numpy(np.array(self.mask.convert("L")).astype(np.float32) / 255)[None, None]
            mask = mask if self.mask_of.get("soft") else torch.round(mask)
        latents = encode_picture(model.vae, torch.lerp(planes, planes * (1 - mask), self.mask_of["weight"] if self.mask else 1.0))
        mask = torch.nn.functional.interpolate(mask, size=(h, w))
        return torch.cat([mask.expand(latents.shape[0], -1, -1, -1), latents], 1)

    def finish(self, index, picture, overlays):
        if self.colors:
            picture = color_corrected(self.colors[index], picture)
        if self.mask and self.mask_of["overlay"]:
            picture = overlaid(picture, overlays[index], self.region)
        return picture


def run(job, model, texts, pictures, mask_picture=None):
    """Latents and pictures of all batches."""
    i2i, h, w = job["img2img"], job["height"] // 8, job["width"] // 8
    total = job["batch"] * job["batches"]
    strength = job.get("subseed_strength", 0.0)
    seeds = [job["seed"] + (i if strength == 0 else 0) for i in range(total)]
    subseeds = [job.get("subseed", 0) + i for i in range(total)]
    # Noise under the mask is drawn once, before the batches, and knows no variation.
    start = Start(job, model, pictures, mask_picture, lambda n: ImageNoise((4, h, w), seeds[:n]).next())
    latents, done = [], []
    for b in range(job["batches"]):
        part = slice(b * job["batch"], (b + 1) * job["batch"])
        noise = ImageNoise((4, h, w), seeds[part], subseeds[part], strength, job.get("seed_resize_from"))
        first = noise.next() * i2i.get("noise_multiplier", 1.0)
        guide = Denoiser(job, model, texts, (job["prompt"], job["negative"]), (job["width"], job["height"]), job["cfg"],
                         expected_calls(job["sampler"], job["steps"]), start.kept, start.extra)
        x = sample(dict(job, extra_noise=i2i.get("extra_noise", 0.0)), guide, noise, first, (start.latents, i2i["strength"], i2i.get("exact", False)))
        overlays = start.overlays
        if start.kept:
            x = start.kept.final(x)
            if start.kept.soft:
                overlays = mode_soft.overlays(start, x)
        latents.append(x)
        done += [start.finish(i, p, overlays) for i, p in enumerate(decode(model.vae, x))]
    return torch.cat(latents), done
