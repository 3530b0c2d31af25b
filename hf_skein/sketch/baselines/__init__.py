"""Other ways to make attention cheaper, for comparison; one idea per file, each beside its formula and its paper.

All take one sequence and have one signature: `(query, key, value, scale, size, seed, layer, heads)`.

- query: `[h, n_q, p]`; key: `[h, n_k, p]`; value: `[h, n_k, pv]`, any floating dtype;
- scale: multiplies the logits;
- size: features, landmarks, rows or keys per query: what the method's cost is linear in;
- seed, layer, heads `[h]`: key of the random numbers, which are those of `sketch/random.py`.

They return `[h, n_q, pv]`. With `d = size`, floating-point operations per head, and what makes each of them exact:

| name | operations | exact if |
|---|---|---|
| `vmean` | `n pv` | the logits of every query are all equal |
| `linformer` | `8 n d p` | the projection is the identity |
| `linformer-jl` | `4 n² p` | likewise |
| `informer` | `6 n d p` | `d = n` |
| `nystromformer` | `8 n d p + 48 d³` | `d = n`, and the inverse has converged |
| `performer` | `8 n d p` | `d` goes to infinity |
| `longformer` | `6 n d p` | the window covers the sequence |
| `bigbird` | `4 n d p` | there are no more than 8 blocks |
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .landmarks import nystromformer
from .patterns import bigbird, longformer
from .projection import linformer, unreduced_jl
from .random_features import performer
from .sparse_queries import informer
from .vmean import v_mean


BASELINES: dict[str, Callable[..., Tensor]] = {
    "vmean": lambda query, key, value, *_: v_mean(query, value),
    "linformer": linformer,
    "linformer-jl": unreduced_jl,
    "informer": informer,
    "nystromformer": nystromformer,
    "performer": performer,
    "longformer": longformer,
    "bigbird": bigbird,
}
