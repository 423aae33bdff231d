"""Picture files and picture operations of Pillow and OpenCV for tests/golden/imaging_*.json.

Needs pillow, numpy, piexif and opencv-python-headless (13.0.0, 2.4.6, 1.1.3 and 5.0.0 made the committed files).
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


if __name__ == "__main__":
    files()
