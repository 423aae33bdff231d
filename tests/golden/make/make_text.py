"""Text conditioning: penultimate hidden states, pooled vector, size vector; chunks and emphasis."""
import torch
from safetensors.torch import load_file

import make_tokens
import tinymodel as T
from common import *  # noqa: F401,F403

PROMPTS = {
    "public": [("a photo of a cat", (1024, 1024), (0, 0), (1024, 1024)), ("", (128, 128), (0, 0), (128, 128)),
               ("masterpiece, best quality, 1girl, solo, looking at viewer", (1216, 832), (0, 0), (1216, 832)),
               ("RAW photo, subject, 8k uhd, dslr, soft lighting, high quality, film grain", (768, 1344), (16, 32), (1024, 1024)),
               ("日本の城、桜、夕焼け", (512, 640), (0, 64), (512, 640)), ("a 😀 smiling 🐱 emoji", (64, 96), (0, 0), (64, 96)),
               ("lowres, bad anatomy, bad hands, text, error", (128, 128), (4, 8), (256, 512)),
               (", ".join(f"tag{i}" for i in range(18)) + ", the end of a long prompt", (1024, 1536), (0, 0), (2048, 3072))],
}


def chunk(ids, pad):
    assert len(ids) <= 75
    return [49406] + ids + [49407] + [pad] * (75 - len(ids))


def ids_for(text, toks, v):
    slow, _, oc = toks
    a = slow(text, add_special_tokens=False, truncation=False)["input_ids"]
    b = oc.encode(text)
    return a, b


def encode_plain(m, v, toks, text, neg_zero=False):
    a, b = ids_for(text, toks, v)
    il, ig = torch.tensor([chunk(a, 49407)]), torch.tensor([chunk(b, 0)])
    r = T.run_text(m, il, ig)
    r["ids_l"], r["ids_g"] = il, ig
    return r


def emphasise(z, w):
    """Scale rows by weight, then restore the mean over the whole tensor of that tower."""
    before = z.mean()
    z = z * w[None, :, None]
    return z * (before / z.mean())


def main(v, out):
    sd = load_file(str(out / "tiny_sdxl.safetensors"))
    m = T.load_own(sd, v)
    oc_native = T.open_clip_native(sd, v)
    toks = make_tokens.tokenizers(v["clip_dir"])
    tens, js, worst = {}, [], 0.0
    for i, (p, orig, crop, tgt) in enumerate(PROMPTS[v["name"]]):
        r = encode_plain(m, v, toks, p)
        worst = max(worst, maxdiff(r["pooled"], oc_native(r["ids_g"])))
        y, ids = T.vector_cond(r["pooled"], orig, crop, tgt)
        for k in ("ids_l", "ids_g", "hidden_l", "hidden_g", "context", "pooled"):
            tens[f"case{i}.{k}"] = r[k]
        tens[f"case{i}.vector"], tens[f"case{i}.time_ids"] = y, ids
        js.append({"case": i, "prompt": p, "original_hw": orig, "crop_top_left": crop, "target_hw": tgt})
    report("pooled vs open_clip module over text cases", worst)
    # weights: explicit ids and multipliers, so independent of any prompt syntax
    g = gen(v["text_seed"])
    n = 23
    ids = torch.randint(300, 49000, (n,), generator=g).tolist()
    w = torch.ones(77)
    w[1:1 + n] = torch.tensor([1.0, 1.1, 1.21, 0.9, 1.4, 0.5] * 4)[:n]
    il, ig = torch.tensor([chunk(ids, 49407)]), torch.tensor([chunk(ids, 0)])
    r = T.run_text(m, il, ig)
    hl, hg = emphasise(r["hidden_l"], w), emphasise(r["hidden_g"], w)
    tens.update({"emphasis.ids_l": il, "emphasis.ids_g": ig, "emphasis.weights": w, "emphasis.hidden_l": hl,
                 "emphasis.hidden_g": hg, "emphasis.context": torch.cat([hl, hg], -1), "emphasis.pooled": r["pooled"]})
    # long prompt: two chunks of 75; contexts concatenated along tokens, pooled of the first chunk
    ids = torch.randint(300, 49000, (75 + 31,), generator=g).tolist()
    ctx, pooled = [], None
    for c, part in enumerate((ids[:75], ids[75:])):
        il, ig = torch.tensor([chunk(part, 49407)]), torch.tensor([chunk(part, 0)])
        r = T.run_text(m, il, ig)
        tens[f"long.ids_l{c}"], tens[f"long.ids_g{c}"] = il, ig
        ctx.append(r["context"])
        pooled = r["pooled"] if pooled is None else pooled
    tens["long.context"], tens["long.pooled"] = torch.cat(ctx, dim=1), pooled
    save_st(out / "text.safetensors", tens)
    save_json(out / "text.json", {
        "cases": js,
        "ids": "ids_l/ids_g [1,77] int64: 49406, ids, 49407, padding (L 49407, G 0)",
        "hidden": "hidden_l/hidden_g [1,77,width]: input of the last transformer layer, no final norm",
        "vector": "[1, pooled + 6*256]: pooled, then cos|sin embedding of original h,w; crop top,left; target h,w",
        "emphasis": "per tower: z*weight per token, then times mean(before)/mean(after) over the whole [1,77,width] tensor; pooled unaffected",
        "long": "106 ids as chunks of 75 and 31; context is [1,154,dim]; pooled is the first chunk's"})
