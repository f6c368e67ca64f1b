"""SO once more, plainly: dense masks, the paper's letters. Only for comparison in tests."""

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
        self.m, self.v = torch.zeros_like(self.W), torch.zeros_like(self.W)  # 0 outside of S_m
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
        l2 = 0.0 if self.decoupled else self.wd * self.W
        g = torch.where(S_g, self.sign * G + l2, 0.0)
        m = self.b1 * self.m + (1 - self.b1) * g
        v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat = m / (1 - self.b1**self.t)
        v_hat = v / (1 - self.b2**self.t)
        self.W = torch.where(U, self.W - self.lr * m_hat / (v_hat.sqrt() + self.eps), self.W)
        score = m.abs().masked_fill(~U, -1).flatten()
        self.S_m = mask(score.argsort(descending=True)[: int(S_g.sum())], U.shape)
        self.m, self.v = m * self.S_m, v * self.S_m


def mask(indices, shape):
    """The boolean mask of flat indices."""
    return torch.zeros(shape, dtype=torch.bool).flatten().index_fill(0, indices, True).view(shape)
