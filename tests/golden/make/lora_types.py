"""Every type of LoRA module on small weights: parts and the merged weight, by numpy's einsum, kron and inv in float64.

    pip install numpy==2.4.6 safetensors==0.8.0
    python lora_types.py            # writes ../lora/types.safetensors

Tensors `CASE.weight`, `CASE.part.PART`, `CASE.merged` and, where a module changes the bias, `CASE.bias`. The
multiplier is 0.7 for every case; `CASE.dyn` is the number of ranks of a truncated case.
"""
import pathlib

import numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "lora" / "types.safetensors"
MULTIPLIER = 0.7
rng = np.random.default_rng(7)
tensors = {}


def r(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def one(value):
    return np.array(value, dtype=np.float32)


def case(name, weight, parts, delta, scale=1.0, bias=None, dyn=None):
    """`delta(w, p)` is the delta before its scale; `dora_scale` and `bias` parts act on it as A1111 does."""
    w = weight.astype(np.float64)
    p = {k: v.astype(np.float64) for k, v in parts.items()}
    d = np.asarray(delta(w, p)).reshape(w.shape)
    if "bias" in p:
        d = d + p["bias"].reshape(w.shape)
    d = d * scale
    axes = tuple(i for i in range(w.ndim) if i != 1)
    if "dora_scale" in p and p["dora_scale"].shape[0] == 1:
        v = w + d
        norm = np.sqrt((v**2).sum(axis=axes, keepdims=True))
        d = v * (p["dora_scale"].reshape(norm.shape) / norm) - w
    elif "dora_scale" in p or "lora_magnitude_vector" in p:
        v = w + d
        norm = np.sqrt((v**2).sum(axis=tuple(range(1, w.ndim)), keepdims=True))
        m = p.get("dora_scale", p.get("lora_magnitude_vector"))
        d = v * (m.reshape(norm.shape) / norm) - w
    tensors[f"{name}.weight"] = weight
    for k, v in parts.items():
        tensors[f"{name}.part.{k}"] = v
    tensors[f"{name}.merged"] = (w + MULTIPLIER * d).astype(np.float32)
    if bias is not None:
        tensors[f"{name}.bias"] = (MULTIPLIER * bias).astype(np.float32)
    if dyn is not None:
        tensors[f"{name}.dyn"] = one(dyn)


def low_rank(w, p):
    up, down = p["lora_up.weight"], p["lora_down.weight"]
    return np.tensordot(up.reshape(up.shape[0], -1), down, axes=1)


def cp(t, a, b):
    return np.einsum("ijkl,ir,jc->rckl", t, a, b)


def kron(w, a, b):
    return np.kron(a.reshape(a.shape + (1,) * (b.ndim - 2)), b)


LINEAR, CONV = (12, 10), (12, 10, 3, 3)

lora = {"lora_up.weight": r(12, 4), "lora_down.weight": r(4, 10)}
case("lora", r(*LINEAR), lora | {"alpha": one(2)}, low_rank, 2 / 4)
case("lora_noalpha", r(*LINEAR), lora, low_rank)
case("lora_scale", r(*LINEAR), lora | {"alpha": one(2), "scale": one(0.3)}, low_rank, np.float64(np.float32(0.3)))
case("lora_dyn", r(*LINEAR), lora | {"alpha": one(2)},
     lambda w, p: p["lora_up.weight"][:, :3] @ p["lora_down.weight"][:3], 2 / 4, dyn=3)
case("lora_bias", r(*LINEAR), lora | {"alpha": one(2), "bias": r(*LINEAR)}, low_rank, 2 / 4)
conv = {"lora_up.weight": r(12, 4, 1, 1), "lora_down.weight": r(4, 10, 3, 3), "alpha": one(4)}
case("locon", r(*CONV), conv, low_rank)
case("locon_cp", r(*CONV), {"lora_up.weight": r(12, 4, 1, 1), "lora_down.weight": r(4, 10, 1, 1), "lora_mid.weight": r(4, 4, 3, 3), "alpha": one(1)},
     lambda w, p: np.einsum("nmkl,in,mj->ijkl", p["lora_mid.weight"], p["lora_up.weight"][..., 0, 0], p["lora_down.weight"][..., 0, 0]), 1 / 4)
case("lora_1x1", r(12, 10), {"lora_up.weight": r(12, 4, 1, 1), "lora_down.weight": r(4, 10, 1, 1), "alpha": one(4)}, low_rank)
case("inpaint_conv_in", r(12, 9, 3, 3), {"lora_up.weight": r(12, 2, 1, 1), "lora_down.weight": r(2, 4, 3, 3)},
     lambda w, p: np.pad(low_rank(w, p), ((0, 0), (0, 5), (0, 0), (0, 0))))

hada = {"hada_w1_a": r(12, 3), "hada_w1_b": r(3, 10), "hada_w2_a": r(12, 3), "hada_w2_b": r(3, 10), "alpha": one(1.5)}
case("loha", r(*LINEAR), hada, lambda w, p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]), 0.5)
tucker = {"hada_w1_a": r(3, 12), "hada_w1_b": r(3, 10), "hada_w2_a": r(3, 12), "hada_w2_b": r(3, 10), "hada_t1": r(3, 3, 3, 3), "hada_t2": r(3, 3, 3, 3), "alpha": one(1.5)}
case("loha_tucker", r(*CONV), tucker,
     lambda w, p: cp(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"]) * cp(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"]), 0.5)

case("lokr_full", r(*LINEAR), {"lokr_w1": r(3, 2), "lokr_w2": r(4, 5), "alpha": one(7)}, lambda w, p: np.kron(p["lokr_w1"], p["lokr_w2"]))
case("lokr_factored", r(*LINEAR), {"lokr_w1_a": r(3, 2), "lokr_w1_b": r(2, 2), "lokr_w2_a": r(4, 3), "lokr_w2_b": r(3, 5), "alpha": one(1)},
     lambda w, p: np.kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2_a"] @ p["lokr_w2_b"]), 1 / 3)
case("lokr_w1_factored", r(*LINEAR), {"lokr_w1_a": r(3, 2), "lokr_w1_b": r(2, 2), "lokr_w2": r(4, 5), "alpha": one(1)},
     lambda w, p: np.kron(p["lokr_w1_a"] @ p["lokr_w1_b"], p["lokr_w2"]), 1 / 2)
case("lokr_conv", r(*CONV), {"lokr_w1": r(3, 2), "lokr_w2": r(4, 5, 3, 3)}, lambda w, p: kron(w, p["lokr_w1"], p["lokr_w2"]))
case("lokr_conv_flat", r(*CONV), {"lokr_w1": r(3, 2), "lokr_w2_a": r(4, 2), "lokr_w2_b": r(2, 45), "alpha": one(1)},
     lambda w, p: np.kron(p["lokr_w1"], p["lokr_w2_a"] @ p["lokr_w2_b"]), 1 / 2)
case("lokr_tucker", r(*CONV), {"lokr_w1": r(3, 2), "lokr_w2_a": r(2, 4), "lokr_w2_b": r(2, 5), "lokr_t2": r(2, 2, 3, 3), "alpha": one(1)},
     lambda w, p: kron(w, p["lokr_w1"], cp(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])), 1 / 2)

case("ia3_output", r(*LINEAR), {"weight": r(12), "on_input": one(0)}, lambda w, p: w * p["weight"].reshape(-1, 1))
case("ia3_input", r(*LINEAR), {"weight": r(10), "on_input": one(1)}, lambda w, p: w * p["weight"])
case("ia3_conv_input", r(*CONV), {"weight": r(1, 10, 1, 1), "on_input": one(1)}, lambda w, p: w * p["weight"])

bias = r(12)
case("full", r(*CONV), {"diff": r(*CONV), "diff_b": bias}, lambda w, p: p["diff"], bias=bias)
case("full_bias_only", r(*LINEAR), {"diff_b": bias}, lambda w, p: np.zeros(LINEAR), bias=bias)
case("norm", r(12), {"w_norm": r(12), "b_norm": bias}, lambda w, p: p["w_norm"], bias=bias)
case("glora", r(*LINEAR), {"a1.weight": r(3, 10), "a2.weight": r(10, 3), "b1.weight": r(3, 10), "b2.weight": r(12, 3), "alpha": one(9)},
     lambda w, p: p["b2.weight"] @ p["b1.weight"] + (w @ p["a2.weight"]) @ p["a1.weight"])


def cayley(b, constraint):
    q = b - np.swapaxes(b, -1, -2)
    if constraint:
        norm = np.linalg.norm(q)
        q = q * ((min(norm, constraint) + 1e-8) / (norm + 1e-8))
    eye = np.eye(b.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def oft(w, rotations):
    n, b, _ = rotations.shape
    return np.einsum("knm,kn...->km...", rotations, w.reshape(n, b, *w.shape[1:])).reshape(w.shape)


def boft(w, rotations):
    m, _, b, _ = rotations.shape
    x = w
    for i in range(m):
        k = 2**i * b // 2
        rest = x.shape[1:]
        x = np.moveaxis(x.reshape(-1, 2, k, *rest), 1, 2).reshape(-1, b, *rest)
        x = np.einsum("bij,bj...->bi...", rotations[i], x).reshape(-1, k, 2, *rest)
        x = np.moveaxis(x, 2, 1).reshape(w.shape)
    return x


case("oft", r(*LINEAR), {"oft_blocks": 0.3 * r(3, 4, 4)}, lambda w, p: oft(w, cayley(p["oft_blocks"], 0)) - w)
case("oft_constraint", r(*CONV), {"oft_blocks": 0.3 * r(3, 4, 4), "alpha": one(0.05)},
     lambda w, p: oft(w, cayley(p["oft_blocks"], p["alpha"] * 12)) - w)
case("oft_rescale", r(*LINEAR), {"oft_blocks": 0.3 * r(3, 4, 4), "rescale": r(12, 1)},
     lambda w, p: p["rescale"] * oft(w, cayley(p["oft_blocks"], 0)) - w)
case("oft_diag", r(*LINEAR), {"oft_diag": r(3, 4, 4)}, lambda w, p: oft(w, p["oft_diag"]) - w)
case("boft", r(16, 10), {"oft_blocks": 0.3 * r(3, 4, 4, 4)}, lambda w, p: boft(w, cayley(p["oft_blocks"], 0)) - w)

case("dora", r(*LINEAR), lora | {"alpha": one(2), "dora_scale": 1 + abs(r(1, 10))}, low_rank, 2 / 4)
case("dora_conv", r(*CONV), conv | {"dora_scale": 1 + abs(r(1, 10, 1, 1))}, low_rank)
case("dora_output", r(*LINEAR), lora | {"alpha": one(2), "dora_scale": 1 + abs(r(12, 1))}, low_rank, 2 / 4)
case("dora_peft", r(*LINEAR), lora | {"lora_magnitude_vector": 1 + abs(r(12))}, low_rank)
case("dora_loha", r(*LINEAR), hada | {"dora_scale": 1 + abs(r(1, 10))},
     lambda w, p: (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]), 0.5)
case("dora_lokr", r(*LINEAR), {"lokr_w1": r(3, 2), "lokr_w2": r(4, 5), "dora_scale": 1 + abs(r(1, 10))}, lambda w, p: np.kron(p["lokr_w1"], p["lokr_w2"]))

save_file(tensors, OUT)
print(len(tensors), "tensors", OUT.stat().st_size, "bytes")
