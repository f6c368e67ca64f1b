"""SO once more, plainly: dense masks, loops, the paper's letters. Only for comparison in tests."""

import torch


class Twin:
    """SO on one tensor W, told which gradient support S_g each step reads."""

    def __init__(
        self,
        W,
        lr=2e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        maximize=False,
        decoupled_weight_decay=False,
        bias_correction="tensor",
    ):
        self.W = W.detach().clone()
        self.lr, (self.b1, self.b2), self.eps, self.wd = lr, betas, eps, weight_decay
        self.sign, self.decoupled = -1 if maximize else 1, decoupled_weight_decay
        self.t = 0 if bias_correction == "tensor" else torch.zeros_like(self.W)
        self.m = torch.zeros_like(self.W)
        self.v = torch.zeros_like(self.W)
        self.S_m = None

    def step(self, G, S_g):
        """One update by the gradient G, read where the boolean mask S_g is set."""
        if self.S_m is None:
            self.S_m = S_g.clone()
        if isinstance(self.t, torch.Tensor):  # of each entry: none without moments
            self.t = self.t * self.S_m
        self.t = self.t + 1
        U = self.S_m | S_g
        if self.decoupled:
            self.W = torch.where(U, self.W * (1 - self.lr * self.wd), self.W)
        m, v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        for i in zip(*U.nonzero(as_tuple=True), strict=True):
            old_m, old_v = (self.m[i], self.v[i]) if self.S_m[i] else (0.0, 0.0)
            l2 = 0.0 if self.decoupled else self.wd * self.W[i]
            g = self.sign * G[i] + l2 if S_g[i] else 0.0
            m[i] = self.b1 * old_m + (1 - self.b1) * g
            v[i] = self.b2 * old_v + (1 - self.b2) * g**2
        m_hat = m / (1 - self.b1**self.t)
        v_hat = v / (1 - self.b2**self.t)
        self.W = torch.where(U, self.W - self.lr * m_hat / (v_hat.sqrt() + self.eps), self.W)
        score = m.abs().masked_fill(~U, -1).flatten()
        self.S_m = torch.zeros_like(U).flatten()
        self.S_m[score.argsort(descending=True)[: int(S_g.sum())]] = True
        self.S_m = self.S_m.view_as(U)
        self.m, self.v = m * self.S_m, v * self.S_m


def mask(indices, shape):
    """The boolean mask of flat indices."""
    out = torch.zeros(shape, dtype=torch.bool).flatten()
    out[indices] = True
    return out.view(shape)
