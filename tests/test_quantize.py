"""quantize.py: brute force, gradients by hand, closed forms, and the official code's numbers."""
import math

import pytest
import torch
from goldens import close, golden, weights
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.quantize import Codebook, Quantised, count, perplexity

def latents(b=2, c=3, h=4, w=5):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(0))


def codebook(n=16, c=3):
    torch.manual_seed(1)
    book = Codebook(n, c)
    torch.nn.init.normal_(book.codes)
    return book


def test_vq_vae_eq_1_and_2_nearest_code_by_brute_force():
    book, z = codebook(), latents()
    q = book(z)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                d = [math.dist(e, z[b, :, i, j].tolist()) for e in book.codes.tolist()]
                k = d.index(min(d))
                assert q.k[b, i, j] == k
                assert_close(q.zq[b, :, i, j], book.codes[k], rtol=0, atol=0)
    assert q.z is z and len(q.k.unique()) > 8


def test_nearest_codes_are_found_in_full_precision_under_autocast():
    """Codes 1e-4 apart, far from 0: bf16, or |z|^2 - 2 z e + |e|^2 in float32, mixes them up."""
    book = Codebook(64, 3)
    book.codes.data = 40 + 1e-4 * torch.arange(64.)[:, None].expand(64, 3)
    k = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(1, 8, 8)
    z = book.codes.data[k].movedim(-1, 1) + 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        q = book(z)
    assert (q.k == k).all() and q.zq.dtype == torch.float32
    assert book(z.bfloat16()).z.dtype == torch.float32


def test_codes_begin_uniform_in_1_over_n():
    codes = Codebook(1000, 8).codes.detach() * 1000
    assert codes.abs().max() <= 1 and abs(codes.std() - 3 ** -0.5) < 0.02


def test_straight_through_hands_the_gradient_to_z_alone():
    book, z = codebook(), latents().requires_grad_()
    q, cotangent = book(z), latents().flip(0)
    out = q.straight_through()
    assert_close(out, q.zq)
    (out * cotangent).sum().backward()
    assert_close(z.grad, cotangent, rtol=0, atol=0)
    assert book.codes.grad is None


@pytest.mark.parametrize("beta_on", ["codebook", "commitment"])
def test_vq_vae_eq_3_gradients_by_hand(beta_on):
    """d/dz of mean((sg(zq) - z)^2) is 2 (z - zq) / n, d/de_j of mean((zq - sg(z))^2) the sum of
    2 (e_j - z) / n over the places that chose j; beta weighs one of the two."""
    book, z, beta = codebook(), latents().requires_grad_(), 0.3
    q = book(z)
    loss = q.loss(beta, beta_on)
    loss.backward()
    d = 2 * (z - q.zq).detach() / z.numel()
    on_codes, on_z = (beta, 1) if beta_on == "codebook" else (1, beta)
    want = torch.zeros_like(book.codes)
    want.index_add_(0, q.k.flatten(), -d.movedim(1, -1).reshape(-1, 3))
    assert_close(z.grad, on_z * d)
    assert_close(book.codes.grad, on_codes * want)
    assert_close(loss, (1 + beta) * (z - q.zq).square().mean())


def test_defaults_are_those_of_the_released_models():
    book, z = codebook(), latents()
    assert book(z).loss() == book(z).loss(0.25, "codebook")
    g = torch.autograd.grad(book(z).loss(), book.codes)[0]
    assert_close(g, torch.autograd.grad(book(z).loss(0.25, "codebook"), book.codes)[0])


def test_perplexity_in_closed_form():
    assert_close(perplexity(torch.tensor([7, 7, 7, 7])), torch.tensor(4.0))
    assert_close(perplexity(torch.tensor([0, 9, 0])), torch.tensor(1.0))
    p = perplexity(torch.tensor([0, 3, 1]))
    assert_close(p.item(), 4 / 27 ** 0.25)          # exp(H(3/4, 1/4)) = 4 / 3^(3/4)
    k = torch.tensor([[[2, 0], [2, 2]]])
    assert count(k, 4).tolist() == [1, 0, 3, 0]


def test_official_perplexity_and_codes_used():
    z = golden("losses")
    n = count(torch.from_numpy(z["in/indices"]), 16)
    close(perplexity(n), z["out/perplexity"])
    assert (n > 0).sum() == z["out/cluster_use"]


def test_restart_moves_idle_codes_only_and_repeats():
    """A code that restarts becomes one of the batch's latents; the rest stay to the bit."""
    z, idle = latents(), torch.arange(16) % 3 == 0
    books = [codebook() for _ in range(3)]
    for book, seed in zip(books, (5, 5, 6)):
        book.restart(idle, z, torch.Generator().manual_seed(seed))
    old, new = codebook().codes, books[0].codes
    assert_close(new[~idle], old[~idle], rtol=0, atol=0)
    rows = {tuple(v) for v in z.movedim(1, -1).reshape(-1, 3).tolist()}
    assert all(tuple(v) in rows for v in new[idle].tolist())
    assert len({tuple(v) for v in new[idle].tolist()}) > 2
    assert_close(new, books[1].codes, rtol=0, atol=0)
    assert (new != books[2].codes).any() and new.requires_grad


def test_official_codebook():
    """ae_vq: indices exactly; loss and quantised latents; gradients with both places of beta."""
    ref = golden("ae_vq")
    book, h = Codebook(64, 3), torch.from_numpy(ref["out/h"]).requires_grad_()
    book.codes.data = weights(ref["recipe"])["quantize.embedding.weight"]
    q = book(h)
    assert (q.k.numpy() == ref["out/indices"]).all()
    close(q.zq, ref["out/codebook_entry"], 0)
    close(q.straight_through(), ref["out/quant"], 1e-7)
    for name, beta_on in (("legacy", "codebook"), ("fixed", "commitment")):
        loss = q.loss(0.25, beta_on)
        close(loss, ref[f"out/loss_{name}"])
        close(loss, ref["out/codebook_loss"])
        on_h, on_codes = torch.autograd.grad(loss, (h, book.codes), retain_graph=True)
        close(on_h, ref[f"out/loss_grad_h_{name}"], 2e-4)
        close(on_codes, ref[f"out/loss_grad_codebook_{name}"], 2e-4)


def test_a_vq_autoencoder_learns_one_batch():
    torch.manual_seed(0)
    ae = Autoencoder(AEConfig(3, 16, (1, 2), 1, 3, groups=8, n_codes=32))
    x = torch.nn.functional.interpolate(torch.rand(4, 3, 4, 4) * 2 - 1, scale_factor=4)
    opt, first = torch.optim.Adam(ae.parameters(), 3e-3), None
    for step in range(150):
        x_rec, q = ae(x, torch.zeros(4, 3, 8, 8))
        loss_rec = (x_rec - x).square().mean()
        first = first or loss_rec.item()
        opt.zero_grad()
        (loss_rec + q.loss()).backward()
        opt.step()
        n = count(q.k, 32)
        if step == 20:
            ae.codebook.restart(n == 0, q.z, torch.Generator().manual_seed(step))
    assert loss_rec < 0.1 * first and (n > 0).sum() > 4, (first, loss_rec, perplexity(n))
    assert isinstance(q, Quantised)
