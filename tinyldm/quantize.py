"""Vector quantisation, the other regulariser of stage one: each latent place becomes a code.

Paper:   Sec. 3.1, App. G; VQ-VAE (van den Oord et al. 2017) Eq. (2), (3); VQGAN.
Symbols: z unscaled; zq the nearest codes, of index k; beta is a weight. Reads: nothing of ours."""
from dataclasses import dataclass

import torch
from torch import Tensor, distributed as dist, nn

@dataclass
class Quantised:
    """What a Codebook makes of z: z and zq (B, c_z, h, w), k (B, h, w)."""
    z: Tensor
    zq: Tensor
    k: Tensor
    def straight_through(self) -> Tensor:
        """zq, but its gradient goes to z as if nothing had been rounded."""
        return self.z + (self.zq - self.z).detach()
    def loss(self, beta: float = 0.25, beta_on: str = "codebook") -> Tensor:
        """VQ-VAE Eq. (3), last two terms, as means, beta on the "codebook" or "commitment" one.
        NB: Eq. (3) has beta on the commitment. The released code has it on the codebook term, by a
        slip, and so trained all its models; the value is the same, the gradients are not."""
        terms = {"codebook": (self.zq - self.z.detach()).square().mean(),
                 "commitment": (self.zq.detach() - self.z).square().mean()}
        return beta * terms.pop(beta_on) + sum(terms.values())

class Codebook(nn.Module):
    """n_codes vectors of width c_z; z (B, c_z, h, w) -> Quantised, in float32."""
    def __init__(self, n_codes: int, c_z: int):
        super().__init__()
        self.codes = nn.Parameter(torch.empty(n_codes, c_z).uniform_(-1 / n_codes, 1 / n_codes))
    def forward(self, z: Tensor) -> Quantised:
        z = z.float()
        k = torch.stack([self.nearest(v) for v in z])       # one by one: the table below is large
        return Quantised(z, self.codes[k].movedim(-1, 1), k)
    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """VQ-VAE Eq. (1), (2): k = argmin_j |z - e_j|; one picture's z (c_z, h, w) -> (h, w).
        No matrix product: bf16 or TF32 would mistake one code for its neighbour."""
        d = sum((v[:, None] - e).square() for v, e in zip(z.flatten(1), self.codes.T))
        return d.argmin(1).view(z.shape[1:])                                    # d (h w, n_codes)
    @torch.no_grad()
    def restart(self, idle: Tensor, z: Tensor, g: torch.Generator) -> None:
        """Codes where idle (n_codes,) is true become random latents of the whole batch; z are this
        process's, and with the same g in all processes, so are the codes afterwards."""
        rows = z.detach().float().movedim(1, -1).flatten(0, 2).contiguous()     # (B h w, c_z)
        if dist.is_initialized():
            parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, rows)
            rows = torch.cat(parts)
        pick = torch.randint(len(rows), idle.shape, generator=g).to(rows.device)
        self.codes.copy_(torch.where(idle[:, None], rows[pick], self.codes))

def count(k: Tensor, n_codes: int) -> Tensor:
    """How often each code was chosen, in all processes together: k (...) -> (n_codes,) int."""
    n = torch.bincount(k.flatten(), minlength=n_codes)
    if dist.is_initialized():
        dist.all_reduce(n)
    return n

def perplexity(n: Tensor) -> Tensor:
    """exp(-sum_j p_j log p_j) of counts n (n_codes,): 1 .. n_codes, as if so many were in use."""
    p = n / n.sum()
    return torch.special.entr(p).sum().exp()
