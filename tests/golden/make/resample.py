"""torch.nn.functional.interpolate on a small latent, for tests/resample.rs.

    pip install torch numpy
    python resample.py > ../resample.json
"""
import json

import torch
import torch.nn.functional as F

torch.manual_seed(3)
x = torch.randn(1, 2, 5, 7)
modes = {
    "Latent": dict(mode="bilinear"),
    "Latent (antialiased)": dict(mode="bilinear", antialias=True),
    "Latent (bicubic)": dict(mode="bicubic"),
    "Latent (bicubic antialiased)": dict(mode="bicubic", antialias=True),
    "Latent (nearest)": dict(mode="nearest"),
    "Latent (nearest-exact)": dict(mode="nearest-exact"),
}
cases = []
for label, options in modes.items():
    for size in [(10, 14), (9, 11), (3, 4), (5, 20), (16, 3)]:
        y = F.interpolate(x, size, **options)
        cases.append({"mode": label, "size": size, "values": [round(v, 7) for v in y.flatten().tolist()]})
print(json.dumps({"torch": torch.__version__, "shape": list(x.shape), "input": x.flatten().tolist(), "cases": cases}))
