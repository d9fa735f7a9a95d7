"""Muon: gradient descent whose steps on a matrix are orthogonal matrices (Jordan et al. 2024, "Muon"), and AdamW.

Self-contained: torch alone.
"""

from collections import defaultdict

import torch
from torch import distributed
from torch.optim.adamw import adamw

# Five Newton-Schulz steps apply the odd quintic a x + b x^3 + c x^5 to the singular values. These are the steep
# coefficients (a, b, c) of Jordan et al., which take all values in [0.0016, 1] to between 0.68 and 1.21.
QUINTIC, STEPS = (3.4445, -4.7750, 2.0315), 5


def orthogonalize(matrices):
    """About U V^T for each matrix U S V^T of a batch (n, rows, columns): its singular values come near 1.

    On a GPU that has bfloat16 the products are in it, which is enough and fast. Elsewhere they are in the precision
    given.
    """
    has_bfloat16 = matrices.is_cuda and torch.cuda.get_device_capability(matrices.device) >= (8, 0)
    x = matrices.bfloat16() if has_bfloat16 else matrices
    x = x.mT if (tall := x.size(1) > x.size(2)) else x  # The shorter side makes the smaller products (rows, rows).
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    # In rows the updates can be added to all weights at once.
    return (x.mT if tall else x).to(matrices.dtype, memory_format=torch.contiguous_format)


def orthogonalize_together(matrices):
    """orthogonalize() of matrices (n, rows, columns) that all processes of a group hold. Each does a share."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return orthogonalize(matrices)
    n, processes = len(matrices), distributed.get_world_size()
    share = -(-n // processes)  # Where there are not enough for all, some processes do the first ones once more.
    places = torch.arange(share, device=matrices.device).add_(distributed.get_rank() * share).remainder_(n)
    done = orthogonalize(matrices[places])
    together = done.new_empty(processes * share, *done.shape[1:])
    distributed.all_gather([*together.chunk(processes)], done)
    return together[:n]


def initial_state(p, group):
    """The state of a parameter before its first step. AdamW's has torch's names."""
    if group["muon"]:
        return {"momentum_buffer": torch.zeros_like(p)}
    step = torch.zeros((), device=p.device if group["fused"] else "cpu")
    return {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups with `muon=True`, all of them matrices (rows, columns), and AdamW for the others.

    A matrix goes down the orthogonalized mean of its gradients, looking ahead (Nesterov). Before it is orthogonalized,
    each row gets a norm of 1, with which small models learned more from each token (records/2026-11-26-muon-changes).
    The entries of the step have a root mean square of 1 / sqrt(longer side). Scaled by 0.2 sqrt(longer side) the step
    is about as large as AdamW's, so that both share learning rates and decay (Liu et al. 2025, "Muon is scalable").
    torch.optim.Muon normalises no rows, takes one matrix at a time, and has no AdamW for the other groups.
    """

    def __init__(self, groups, lr, betas, momentum=0.95, eps=1e-8, fused=True):
        defaults = dict(lr=lr, betas=betas, momentum=momentum, eps=eps, weight_decay=0.0, muon=False, fused=fused)
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = initial_state(p, group)
            (self.muon_step if group["muon"] else self.adamw_step)(group, params)

    def muon_step(self, group, params):
        alike = defaultdict(list)  # {shape: parameters that go through orthogonalize in one batch}
        for p in params:
            alike[p.shape].append(p)
        for (rows, columns), ps in alike.items():
            grads, means = [p.grad for p in ps], [self.state[p]["momentum_buffer"] for p in ps]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            ahead = torch.stack(torch._foreach_lerp(grads, means, group["momentum"]))
            ahead /= ahead.norm(dim=2, keepdim=True) + 1e-12  # (n, rows, columns)
            updates = orthogonalize_together(ahead).unbind()
            torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(ps, updates, alpha=-0.2 * max(rows, columns) ** 0.5 * group["lr"])

    def adamw_step(self, group, params):
        means, squares, steps = ([self.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq", "step"))
        options = {k: group[k] for k in ("lr", "weight_decay", "eps", "fused")} | {"amsgrad": False, "maximize": False}
        beta1, beta2 = group["betas"]
        adamw(params, [p.grad for p in params], means, squares, [], steps, beta1=beta1, beta2=beta2, **options)
