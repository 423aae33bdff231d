"""Picture files and picture operations of Pillow and OpenCV for tests/golden/imaging_*.json.

Needs pillow, numpy, piexif and opencv-python-headless (9.5.0, 2.4.6, 1.1.3 and 5.0.0 made the committed files). 9.5.0 is the
Pillow that A1111 1.10 pins; 13.0.0 gives the same but where the width grows and the height shrinks: there it scales down first.
"""
import base64
import io
import json
import pathlib
import zlib

import cv2
import numpy as np
import piexif
import piexif.helper
from PIL import Image, ImageChops, ImageFilter
from PIL.PngImagePlugin import PngInfo

HERE = pathlib.Path(__file__).resolve().parent.parent
TEXT = "a cat\nSteps: 20, Sampler: Euler, Seed: 1"
UNICODE = "日本 é\nSteps: 20, Sampler: Euler, Seed: 1"


def b64(data):
    return base64.b64encode(bytes(data)).decode()


def write(name, cases):
    lines = ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases)
    (HERE / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def smooth(width, height, channels=3):
    """A picture without hard edges, so that JPEG decoders agree closely."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    planes = [127 + 100 * np.sin(x / (5 + c) + y / (7 - c) + c) for c in range(channels)]
    return np.stack(planes, -1).round().astype(np.uint8)


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif_comment(text):
    return piexif.dump({"Exif": {piexif.ExifIFD.UserComment: piexif.helper.UserComment.dump(text, encoding="unicode")}})


def png_text(**chunks):
    info = PngInfo()
    for key, (text, kind) in chunks.items():
        if kind == "tEXt":
            info.add_text(key, text)
        elif kind == "zTXt":
            info.add_text(key, text, zip=True)
        else:
            info.add_itxt(key, text, zip=kind == "iTXt zip")
    return info


def chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def files():
    rgb = Image.fromarray(smooth(24, 16))
    rgba = Image.fromarray(smooth(24, 16, 4), "RGBA")
    grey = rgb.convert("L")
    cases = []

    def add(name, data, want, tolerance, infotext=None, texts=None):
        cases.append({"name": name, "file": b64(data), "mode": want.mode, "size": list(want.size), "pixels": b64(want.tobytes()),
                      "tolerance": tolerance, "infotext": infotext, "texts": texts or []})

    add("png tEXt", saved(rgb, "PNG", pnginfo=png_text(parameters=(TEXT, "tEXt"), other=("x", "tEXt"))), rgb, 0, TEXT, [["parameters", TEXT], ["other", "x"]])
    add("png iTXt", saved(rgb, "PNG", pnginfo=png_text(parameters=(UNICODE, "iTXt"))), rgb, 0, UNICODE, [["parameters", UNICODE]])
    add("png zTXt", saved(rgb, "PNG", pnginfo=png_text(parameters=(TEXT, "zTXt"))), rgb, 0, TEXT, [["parameters", TEXT]])
    add("png iTXt packed", saved(rgb, "PNG", pnginfo=png_text(parameters=(UNICODE, "iTXt zip"))), rgb, 0, UNICODE, [["parameters", UNICODE]])
    plain = saved(rgb, "PNG")
    add("png text behind the pixels", plain[:-12] + chunk(b"tEXt", b"parameters\0late") + plain[-12:], rgb, 0, "late", [["parameters", "late"]])
    add("png extras", saved(rgb, "PNG", pnginfo=png_text(postprocessing=("p", "tEXt"), extras=("e", "tEXt"))), rgb, 0, "e", [["postprocessing", "p"], ["extras", "e"]])
    add("png rgba", saved(rgba, "PNG"), rgba, 0)
    add("png grey", saved(grey, "PNG"), grey, 0)
    add("png palette", saved(rgb.quantize(16), "PNG"), rgb.quantize(16).convert("RGB"), 0)
    add("png palette with transparency", saved(rgb.quantize(16), "PNG", transparency=3),
        Image.open(io.BytesIO(saved(rgb.quantize(16), "PNG", transparency=3))).convert("RGBA"), 0)
    add("png one bit", saved(grey.convert("1"), "PNG"), grey.convert("1").convert("L"), 0)
    add("png grey and alpha", saved(rgba.convert("LA"), "PNG"), rgba.convert("LA").convert("RGBA"), 0)
    wide = cv2.imencode(".png", (smooth(24, 16)[:, :, ::-1].astype(np.uint16) * 257))[1].tobytes()
    add("png 16 bit", wide, rgb, 0)
    add("jpeg comment", saved(rgb, "JPEG", quality=95, subsampling=0, exif=exif_comment(UNICODE)), rgb, 12, UNICODE)
    add("jpeg 4:2:0", saved(rgb, "JPEG", quality=90), Image.open(io.BytesIO(saved(rgb, "JPEG", quality=90))), 12)
    add("jpeg progressive", saved(rgb, "JPEG", quality=95, progressive=True, subsampling=0), rgb, 12)
    add("jpeg grey", saved(grey, "JPEG", quality=95), grey, 12)
    add("jpeg cmyk", saved(rgb.convert("CMYK"), "JPEG", quality=95), rgb, 12)
    for orientation, turn in [(2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90)]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"jpeg orientation {orientation}", saved(rgb, "JPEG", quality=95, subsampling=0, exif=exif), rgb.transpose(turn), 12)
    add("webp lossless comment", saved(rgb, "WEBP", lossless=True, exif=exif_comment(UNICODE)), rgb, 0, UNICODE)
    add("webp lossless alpha", saved(rgba, "WEBP", lossless=True, exact=True), rgba, 0)
    add("webp lossy", saved(rgb, "WEBP", quality=90), Image.open(io.BytesIO(saved(rgb, "WEBP", quality=90))), 4)
    novel = {"steps": 28, "sampler": "k_euler_ancestral", "seed": 7, "uc": "bad", "scale": 11.0, "width": 512, "height": 768}
    info = png_text(Software=("NovelAI", "tEXt"), Description=("a fox", "tEXt"), Comment=(json.dumps(novel), "tEXt"))
    text = "a fox\nNegative prompt: bad\nSteps: 28, Sampler: Euler a, CFG scale: 11.0, Seed: 7, Size: 512x768, Clip skip: 2, ENSD: 31337"
    add("png by NovelAI", saved(rgb, "PNG", pnginfo=info), rgb, 0, text, [["Software", "NovelAI"], ["Description", "a fox"], ["Comment", json.dumps(novel)]])
    write("imaging_files.json", cases)


FILTERS = {"Nearest": 0, "Box": 4, "Bilinear": 2, "Bicubic": 3, "Lanczos": 1}


def noise(mode, width, height, seed):
    """Pixels of a 32-bit linear congruential generator, which the test repeats."""
    count = width * height * len(mode)
    out = bytearray(count)
    for index in range(count):
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        out[index] = seed >> 24
    return Image.frombytes(mode, (width, height), bytes(out))


def blob(width, height, seed):
    """A mask with a soft and a hard part."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4:height // 2, width // 5:width // 2] = 255
    mask[height // 2, width // 2:width * 3 // 4] = rng.integers(1, 256, width * 3 // 4 - width // 2)
    return Image.fromarray(mask)


def result(image):
    """CRC and size of a picture; a short one is given in full."""
    data = image.tobytes()
    return {"size": list(image.size), "crc": zlib.crc32(data), "pixels": b64(data) if len(data) <= 96 else None}


def operations():
    cases = []

    def add(op, want, **facts):
        cases.append({"op": op, **facts, "want": result(want)})

    seed = 1
    for mode in ["L", "RGB", "RGBA"]:
        for name, number in FILTERS.items():
            for source, target in [((24, 16), (50, 33)), ((24, 16), (7, 5)), ((31, 17), (31, 40)), ((31, 17), (5, 17)), ((9, 9), (1, 1)), ((1, 3), (6, 4)), ((64, 48), (64, 48)), ((333, 5), (100, 9))]:
                seed += 1
                add("resize", noise(mode, *source, seed).resize(target, number), mode=mode, filter=name, source=source, target=target, seed=seed)
    for mode in ["L", "RGB", "RGBA"]:
        for radius in [0, 0.5, 1, 2, 3.7, 4, 16, 64, 256]:
            for size in [(40, 30), (5, 3), (1, 9)]:
                seed += 1
                add("gaussian", noise(mode, *size, seed).filter(ImageFilter.GaussianBlur(radius)), mode=mode, source=size, radius=radius, seed=seed)
    for sigma in [1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 32, 48, 64]:
        for size in [(70, 20), (9, 6), (1, 4)]:
            seed += 1
            grey = np.array(noise("L", *size, seed))
            kernel = 2 * int(2.5 * sigma + 0.5) + 1
            add("blur", Image.fromarray(cv2.GaussianBlur(grey, (kernel, 1), sigma).reshape(grey.shape)), axis="Across", source=size, sigma=sigma, seed=seed)
            add("blur", Image.fromarray(cv2.GaussianBlur(grey, (1, kernel), sigma).reshape(grey.shape)), axis="Down", source=size, sigma=sigma, seed=seed)
    size = (64, 64)
    for mode in ["L", "RGB", "RGBA"]:
        seed += 3
        under = noise(mode, *size, seed)
        under.paste(noise(mode, *size, seed + 1), mask=noise("L", *size, seed + 2))
        add("paste", under, mode=mode, source=size, seed=seed)
    for amount in [0, 0.25, 0.5, 1, 1.5, -0.5]:
        seed += 2
        add("blend", Image.blend(noise("RGB", *size, seed), noise("RGB", *size, seed + 1), amount), source=size, seed=seed, amount=amount)
    seed += 2
    under = noise("RGBA", *size, seed)
    under.alpha_composite(noise("RGBA", *size, seed + 1))
    add("alpha_composite", under, source=size, seed=seed)
    seed += 2
    add("grey", noise("RGB", *size, seed).convert("L"), source=size, seed=seed)
    flat = Image.new("RGBA", size, (255, 128, 7))
    image = noise("RGBA", *size, seed)
    flat.paste(image, mask=image)
    add("flatten", flat.convert("RGB"), source=size, seed=seed)
    add("premultiply", noise("RGBA", *size, seed).convert("RGBa").convert("RGBA"), source=size, seed=seed)
    write("imaging_operations.json", cases)


def fit(mode, image, width, height):
    """What A1111 makes of a picture for each resize mode: integer sizes, paste, empty boxes at the edges."""
    scale = lambda w, h: image.resize((w, h), resample=1)
    if mode == 0:
        return scale(width, height)
    wide = width / height > image.width / image.height
    narrow = width / height < image.width / image.height
    by_height, by_width = image.width * height // image.height, image.height * width // image.width
    if mode == 1:
        w, h = (width, by_width) if wide else (by_height, height)
    else:
        w, h = width if narrow else by_height, by_width if narrow else height
    scaled = scale(w, h)
    out = Image.new(image.mode, (width, height))
    x, y = width // 2 - w // 2, height // 2 - h // 2
    out.paste(scaled, box=(x, y))
    if mode == 2 and narrow and y > 0:
        out.paste(scaled.resize((width, y), box=(0, 0, width, 0)), box=(0, 0))
        out.paste(scaled.resize((width, y), box=(0, h, width, h)), box=(0, y + h))
    if mode == 2 and wide and x > 0:
        out.paste(scaled.resize((x, height), box=(0, 0, 0, height)), box=(0, 0))
        out.paste(scaled.resize((x, height), box=(w, 0, w, height)), box=(x + w, 0))
    return out


def outside(image, mask):
    canvas = Image.new("RGBa", image.size)
    canvas.paste(image.convert("RGBA").convert("RGBa"), mask=ImageChops.invert(mask))
    return canvas


def fill(image, mask):
    masked = outside(image, mask)
    out = Image.new("RGBA", image.size)
    for radius, repeats in [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)]:
        layer = masked.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            out.alpha_composite(layer)
    return out.convert("RGB")


def blur(mask, sigma):
    data = np.array(mask)
    kernel = 2 * int(2.5 * sigma + 0.5) + 1
    data = cv2.GaussianBlur(data, (kernel, 1), sigma).reshape(data.shape)
    return Image.fromarray(cv2.GaussianBlur(data, (1, kernel), sigma).reshape(data.shape))


def preparation():
    cases = []
    seed = 5000
    for mode in [0, 1, 2]:
        for source, target in [((80, 60), (102, 102)), ((60, 81), (104, 76)), ((30, 30), (64, 64)), ((97, 31), (64, 48)), ((31, 97), (64, 48)), ((50, 51), (50, 64))]:
            seed += 1
            for kind in ["L", "RGB"]:
                cases.append({"op": "fit", "mode": mode, "kind": kind, "source": source, "target": target, "seed": seed,
                              "want": result(fit(mode, noise(kind, *source, seed), *target))})
    for resize_mode, source, target, sigma in [(0, (96, 64), (64, 64), 4), (1, (96, 64), (64, 64), 2), (2, (96, 64), (64, 80), 8), (1, (64, 64), (64, 64), 4)]:
        seed += 1
        image, mask = noise("RGB", *source, seed), blob(*source, seed)
        blurred = blur(mask, sigma)
        fitted = fit(resize_mode, blurred, *target)
        overlay_mask = Image.fromarray(np.clip(np.array(fitted).astype(np.float32) * 2, 0, 255).astype(np.uint8))
        base = fit(resize_mode, image, *target)
        overlay = outside(base, overlay_mask).convert("RGBA")
        painted = noise("RGB", *target, seed + 100)
        done = painted.convert("RGBA")
        done.alpha_composite(overlay)
        small = (target[0] // 8, target[1] // 8)
        latent = np.around(np.array(fitted.convert("RGB").resize(small)).astype(np.float32)[:, :, 0] / 255)
        cases.append({"op": "whole", "mode": resize_mode, "source": source, "target": target, "sigma": sigma, "seed": seed, "mask_pixels": b64(mask.tobytes()),
                      "mask": result(fitted), "overlay_mask": result(overlay_mask), "overlay": result(overlay), "image": result(base), "fill": result(fill(base, fitted)),
                      "done": result(done.convert("RGB")), "latent": latent.astype(int).ravel().tolist(), "soft": result(fitted.resize(small))})
    for source, target, sigma, box in [((96, 64), (64, 64), 3, None), ((64, 96), (80, 48), 2, None)]:
        seed += 1
        image, mask = noise("RGB", *source, seed), blob(*source, seed)
        blurred = blur(mask, sigma)
        x1, y1, x2, y2 = blurred.getbbox()
        pad = 5
        region = expand((max(x1 - pad, 0), max(y1 - pad, 0), min(x2 + pad, source[0]), min(y2 + pad, source[1])), target, source)
        overlay = outside(image, blurred).convert("RGBA")
        painted = noise("RGB", *target, seed + 100)
        canvas = Image.new("RGBA", source)
        canvas.paste(fit(1, painted, region[2] - region[0], region[3] - region[1]), region[:2])
        composite = Image.composite(canvas.convert("RGBa"), Image.new("RGBa", source), blurred).convert("RGBA")
        canvas.alpha_composite(overlay)
        seen = fit(2, blurred.crop(region), *target)
        cases.append({"op": "masked", "source": source, "target": target, "sigma": sigma, "padding": pad, "seed": seed, "mask_pixels": b64(mask.tobytes()),
                      "region": [region[0], region[1], region[2] - region[0], region[3] - region[1]], "mask": result(seen), "overlay": result(overlay),
                      "image": result(fit(2, image.crop(region), *target)), "done": result(canvas.convert("RGB")), "composite": result(composite)})
    write("imaging_preparation.json", cases)


def expand(box, size, picture):
    """Widens a box to the ratio of the job, by the rule of the specification."""
    x1, y1, x2, y2 = box
    ratio = size[0] / size[1]

    def widen(start, end, more, limit):
        start -= more // 2
        end += more - more // 2
        if end >= limit:
            start -= end - limit
            end = limit
        if start < 0:
            end -= start
            start = 0
        return start, min(end, limit)

    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = widen(y1, y2, int((x2 - x1) / ratio - (y2 - y1)), picture[1])
    else:
        x1, x2 = widen(x1, x2, int((y2 - y1) * ratio - (x2 - x1)), picture[0])
    return x1, y1, x2, y2


def correct(result_image, reference):
    """A1111's colour correction: OpenCV's CIELAB, scikit-image's histogram matching, luminosity of the result."""
    lab, want = cv2.cvtColor(np.array(result_image), cv2.COLOR_RGB2LAB), cv2.cvtColor(np.array(reference), cv2.COLOR_RGB2LAB)
    matched = np.empty_like(lab)
    for channel in range(3):
        source, template = lab[:, :, channel].reshape(-1), want[:, :, channel].reshape(-1)
        values, counts = np.unique(template, return_counts=True)
        ranks = np.cumsum(np.bincount(source, minlength=256)) / source.size
        matched[:, :, channel] = np.interp(ranks, np.cumsum(counts) / template.size, values)[source].reshape(lab.shape[:2])
    color, base = cv2.cvtColor(matched, cv2.COLOR_LAB2RGB) / 255.0, np.array(result_image) / 255.0
    luma = lambda c: (c * [0.3, 0.59, 0.11]).sum(-1, keepdims=True)
    color = color + luma(base) - luma(color)
    level, low, high = luma(color), color.min(-1, keepdims=True), color.max(-1, keepdims=True)
    with np.errstate(all="ignore"):
        color = np.where(low < 0, level + (color - level) * level / (level - low), color)
        color = np.where(high > 1, level + (color - level) * (1 - level) / (high - level), color)
    return Image.fromarray((np.nan_to_num(color).clip(0, 1) * 255).round().astype(np.uint8))


def color():
    reference = smooth(32, 24)
    picture = smooth(32, 24)[::-1, :, ::-1] // 2 + 60
    image = correct(Image.fromarray(np.ascontiguousarray(picture)), Image.fromarray(reference))
    write("imaging_color.json", [{"size": [32, 24], "reference": b64(reference.tobytes()), "picture": b64(np.ascontiguousarray(picture).tobytes()), "want": b64(image.tobytes())}])


if __name__ == "__main__":
    color()
    files()
    operations()
    preparation()
