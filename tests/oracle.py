"""NumPy oracles, written from the papers. No code is shared with the library."""

import math

import numpy as np


def drop_and_grow(mask, drop_score, grow_score, k, regrow):
    """One layer of Algorithm 1's mask step: sorts, index by index."""
    flat, drop, grow = mask.ravel(), drop_score.ravel(), grow_score.ravel()
    active = [i for i in range(flat.size) if flat[i]]
    dropped = sorted(active, key=lambda i: (drop[i], i))[:k]
    inactive = [i for i in range(flat.size) if not flat[i]]
    free = inactive + (dropped if regrow else [])
    grown = sorted(free, key=lambda i: (-grow[i], i))[:k]
    new = flat.copy()
    new[dropped] = False
    new[grown] = True
    return new.reshape(mask.shape)


class Sgd:
    """SGD with heavy-ball momentum on a sparse weight, with mask updates of one method."""

    def __init__(self, weight, mask, *, method, lr, momentum, every, stop, alpha, c=0.0, eps=1.0):
        self.w = (weight * mask).astype(np.float32)
        self.mask, self.counter = mask.copy(), mask.astype(np.int64)
        self.m = np.zeros_like(self.w)
        self.method, self.lr, self.momentum = method, lr, momentum
        self.every, self.stop, self.alpha, self.c, self.eps = every, stop, alpha, c, eps
        self.t = 0

    def step(self, grad):
        self.t += 1
        fraction = self.alpha / 2 * (1 + math.cos(math.pi * self.t / self.stop))
        if self.t % self.every or self.t > self.stop or fraction < 1e-7:
            self.m = self.momentum * self.m + grad * self.mask
            self.w = (self.w - self.lr * self.m) * self.mask
            return
        k = max(1, math.floor(fraction * self.mask.sum()))
        k = min(k, (~self.mask).sum()) if self.method == "dst_ee" else k
        score = np.abs(grad)
        if self.method == "dst_ee":
            score = score + self.c * np.log(np.float32(self.t)) / (self.counter + self.eps)
            score = score.astype(np.float32)
        new = drop_and_grow(self.mask, np.abs(self.w), score, k, regrow=self.method == "rigl")
        stays = self.mask & new
        self.w, self.m, self.mask = self.w * stays, self.m * stays, new
        self.counter += new


def erk(shapes, sparsity):
    """Densities by the formula of METHODS: probabilities capped at 1 until none is above."""
    dense = set()
    while True:
        keep, weight = 0.0, 0.0
        for i, shape in enumerate(shapes):
            n = math.prod(shape)
            zeros = math.floor(sparsity * n)
            if i in dense:
                keep -= zeros
            else:
                keep += n - zeros
                weight += sum(shape)
        eps = keep / weight
        density = [1.0 if i in dense else eps * sum(s) / math.prod(s) for i, s in enumerate(shapes)]
        ratio = {i: sum(s) / math.prod(s) for i, s in enumerate(shapes) if i not in dense}
        top = max(ratio.values())
        if top * eps <= 1:
            return density
        dense |= {i for i, r in ratio.items() if r == top}
