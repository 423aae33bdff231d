"""Soft inpainting: the blend of each call, and the overlay mask made from how far the result is from the picture."""
import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter

from mode_parts import resize


def blend(soft, kept, painted, paint, sigma):
    """Mixture by a mask that widens as sigma falls, with its vectors' length restored."""
    t = paint ** (sigma ** soft["power"] * soft["scale"])
    mixed = kept * (1 - t) + painted * t
    length = lambda v: v.norm(p=2, dim=1, keepdim=True).double()
    wanted = (length(kept) ** soft["contrast"] * (1 - t[:1]) + length(painted) ** soft["contrast"] * t[:1]) ** (1 / soft["contrast"])
    return (mixed * (wanted / (length(mixed) + 1e-5))).float()


def kernel():
    """5x5, Gaussian of radius 1.5, moved down to reach 0 at distance 3."""
    y, x = np.mgrid[-2:3, -2:3]
    g, zero = np.exp(-(x ** 2 + y ** 2) / 2.25), np.exp(-9 / 2.25)
    return np.maximum(0, (g - zero) / (1 - zero))


def between(values, weights, low, high, least):
    """Mean of the part of the sorted values between two shares of their weight, at least `least` of weight wide."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    ends = np.cumsum(weights)
    total = ends[-1]
    a, b = total * low, total * high
    if b - a < least:
        middle = (a + b) / 2
        a, b = middle - least / 2, middle + least / 2
        if b > total:
            a, b = total - least, total
        if a < 0:
            a, b = 0, least
    overlap = np.clip(np.minimum(b, ends) - np.maximum(a, ends - weights), 0, None)
    return (values * overlap).sum() / overlap.sum() if overlap.sum() else 0.0


def filtered(plane, low, high):
    k, out = kernel(), plane.copy()
    for y, x in np.ndindex(plane.shape):
        top, left = max(y - 2, 0), max(x - 2, 0)
        part = plane[top:y + 3, left:x + 3]
        weights = k[top - y + 2:top - y + 2 + part.shape[0], left - x + 2:left - x + 2 + part.shape[1]]
        out[y, x] = between(part.ravel().astype(np.float64), weights.ravel(), low, high, 1.0)
    return out


def mask_for(soft, paint, distance, size):
    """Opacity of what is painted: it falls where the result has stayed near the picture."""
    share = 1 - paint[0].clamp(0, 1) ** (soft["scale"] / 2)
    share = 0.5 * (1 - soft["influence"]) + share * soft["influence"]
    share = (share / (1.00001 - share)).numpy()
    y = filtered(filtered(distance.numpy(), 0.9, 1.0), 0.25, 0.75)
    y = 1 / (1 + (y / (soft["threshold"] * share)) ** soft["difference_contrast"])
    y = y ** 3 * (y * (6 * y - 15) + 10)
    mask = Image.fromarray((255 * (1 - y)).astype(np.uint8))
    return resize(mask, 2, *size).convert("L").filter(ImageFilter.GaussianBlur(4))


def overlays(start, samples):
    out = []
    distances = (samples - start.kept.init).norm(p=2, dim=1)
    for picture, distance in zip(start.sources, distances):
        picture = picture.convert("RGB")
        mask = mask_for(start.kept.soft, start.kept.paint, distance, start.size)
        if start.region is None and start.i2i["resize_mode"] != 3:
            picture = resize(picture, start.i2i["resize_mode"], *start.size)
        if start.region:
            whole = Image.new("L", picture.size)
            whole.paste(resize(mask, 1, start.region[2] - start.region[0], start.region[3] - start.region[1]).convert("L"), start.region[:2])
            mask = whole
        out_picture = Image.new("RGBa", picture.size)
        out_picture.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageChops.invert(mask))
        out.append(out_picture.convert("RGBA"))
    return out
