"""Vector quantisation, one of the two regularisers of stage one: latents become codes.

Paper:   Sec. 3.1, App. G; VQ-VAE (van den Oord et al. 2017), Eq. (1)-(3); VQGAN (Esser
         et al. 2021).
Symbols: z latents (B, c_z, h, w), not divided by z_std; codes e_j (n_codes, c_z); k
         (B, h, w) the number of the code nearest to each latent; zq (B, c_z, h, w)
         those codes; beta a weight.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Quantised:
    """The result of a Codebook: latents, their nearest codes and the codes' numbers."""

    z: Tensor                       # (B, c_z, h, w)
    zq: Tensor                      # (B, c_z, h, w)
    k: Tensor                       # (B, h, w), 0..n_codes-1

    def straight_through(self) -> Tensor:
        """Return zq, but with a gradient that goes to z as if nothing had been rounded.

        Why: the gradient of rounding itself is zero, and E would not learn.
        """
        return self.z + (self.zq - self.z).detach()

    def loss(self, beta: float = 0.25, beta_on: str = "codebook") -> Tensor:
        """Return the last two terms of VQ-VAE Eq. (3), as means over all values.

        The codebook term moves codes towards latents; the commitment term moves latents
        towards codes. beta weighs the term that beta_on names: "codebook" or
        "commitment".

        NB: Eq. (3) has beta on the commitment term. The released code has it on the
        codebook term, by a slip, and all its models were trained so. The two losses
        have the same value, but not the same gradients.
        """
        codebook_term = (self.zq - self.z.detach()).square().mean()
        commitment_term = (self.zq.detach() - self.z).square().mean()

        if beta_on == "codebook":
            return beta * codebook_term + commitment_term
        if beta_on == "commitment":
            return codebook_term + beta * commitment_term
        raise ValueError(f"beta_on {beta_on!r}: must be 'codebook' or 'commitment'")


class Codebook(nn.Module):
    """n_codes learned vectors of width c_z: z (B, c_z, h, w) -> Quantised (float32)."""

    def __init__(self, n_codes: int, c_z: int):
        super().__init__()
        codes = torch.empty(n_codes, c_z).uniform_(-1 / n_codes, 1 / n_codes)
        self.codes = nn.Parameter(codes)

    def forward(self, z: Tensor) -> Quantised:
        z = z.float()

        # One image at a time, because the table of distances is large: h * w * n_codes.
        k = torch.stack([self.nearest(z_image) for z_image in z])   # (B, h, w)

        zq = self.codes[k].movedim(-1, 1)                           # (B, c_z, h, w)
        return Quantised(z, zq, k)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Return the number of the code nearest to each latent of one image.

        z (c_z, h, w) -> (h, w). VQ-VAE Eq. (1), (2): k = argmin_j |z - e_j|.

        Why not as |z|^2 - 2 z e + |e|^2: its matrix product is faster, but in bfloat16
        or TF32 it mistakes a code for its neighbour.
        """
        z_places = z.flatten(1)                                     # (c_z, h * w)
        distance = z.new_zeros(z_places.shape[1], len(self.codes))  # squared
        for z_channel, codes_channel in zip(z_places, self.codes.T):
            difference = z_channel[:, None] - codes_channel         # (h * w, n_codes)
            distance += difference.square()

        return distance.argmin(1).view(z.shape[1:])                 # (h, w)

    @torch.no_grad()
    def restart(self, idle: Tensor, z_rows: Tensor, generator: torch.Generator) -> None:
        """Replace idle codes by random latents.

        idle (n_codes,) is true for the codes to replace; z_rows (n, c_z) are the
        latents of the whole batch, one per row (rows_of_latents). With equal z_rows and
        equal generators, all processes of a run get equal codes.

        Why: a code that is nearest to no latent gets no gradient, so it stays unused.
        """
        pick = torch.randint(len(z_rows), idle.shape, generator=generator)
        new_codes = z_rows[pick.to(z_rows.device)]                  # (n_codes, c_z)
        self.codes.copy_(torch.where(idle[:, None], new_codes, self.codes))


def rows_of_latents(z: Tensor) -> Tensor:
    """Return latents one per row, without gradient: (B, c_z, h, w) -> (B h w, c_z)."""
    return z.detach().movedim(1, -1).flatten(0, 2)


def count_codes(k: Tensor, n_codes: int) -> Tensor:
    """Return how often each code is chosen: k (any shape) -> (n_codes,), integers."""
    return torch.bincount(k.flatten(), minlength=n_codes)


def perplexity(counts: Tensor) -> Tensor:
    """Return exp(-sum_j p_j log p_j), with p_j the share of code j in the counts.

    counts is (n_codes,). The result says how many codes are effectively in use: 1 if
    all latents have the same code, n_codes if all codes are chosen equally often.
    """
    p = counts / counts.sum()
    entropy = torch.special.entr(p).sum()       # the sum of -p log p, with 0 log 0 = 0
    return entropy.exp()
