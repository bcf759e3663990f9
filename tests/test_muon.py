"""Muon: orthogonal updates against the SVD; AdamW for what is no matrix; resumed runs."""
import copy
import dataclasses

import pytest
import torch
from runs import assert_same_state
from torch import nn

import train_ae
import train_ldm
from tinyldm.beyond import muon
from tinyldm.beyond.muon import Muon, matrices, orthogonal
from tinyldm.engine.checkpoint import fill_optimiser, load_checkpoint
from tinyldm.errors import BadInput

TINY = ["--data", "shapes", "--ae", "toy", "--n-shapes", "40", "--ch", "16", "--batch", "4",
        "--eval-n", "0", "--muon", "0.02"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 7),
        nn.Embedding(5, 6),
    )


def with_gradients(net, seed=1):
    """Give every weight a random gradient, which the seed determines."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=rng)
    return net


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (12, 12)])
def test_an_update_has_the_directions_of_the_svd_and_almost_equal_strengths(shape):
    torch.manual_seed(0)
    u, s, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(3, 1.5, len(s))                      # strong and weak directions: 1000 .. 32
    strengths = u.T @ orthogonal(u * s @ vt) @ vt.T         # a diagonal, if the directions agree
    found = strengths.diagonal()
    assert found.min() > 0.6
    assert found.max() < 1.25
    assert (strengths - strengths.diagonal().diag()).abs().max() < 1e-4
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


def test_matrices_are_the_weights_of_layers_and_nothing_else():
    net = network()
    assert [p.shape for p in matrices(net)] == [(4, 3, 3, 3), (7, 16)]


def test_a_step_of_a_matrix_is_the_formula_and_the_rest_is_adamw():
    net = with_gradients(network())
    reference = with_gradients(network())
    opt = Muon(net.parameters(), [net], lr=1e-3, muon_lr=0.02, betas=(0.9, 0.99))
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    before = [p.detach().clone() for p in matrices(net)]
    momenta = [torch.zeros_like(p) for p in before]

    for step in range(2):
        with_gradients(net, step)
        with_gradients(reference, step)
        for group in (opt.param_groups[0], adamw.param_groups[0]):
            group["lr"] = 5e-4                              # half of it: so has the matrices' rate
        expected = []
        for p, momentum in zip(matrices(net), momenta):
            momentum += 0.05 * (p.grad - momentum)
            ahead = 0.05 * p.grad + 0.95 * momentum
            u, _, vt = torch.linalg.svd(ahead.flatten(1), full_matrices=False)
            rows, columns = ahead.flatten(1).shape
            exact = (u @ vt).view_as(p) * max(1, rows / columns) ** 0.5
            expected.append((p.detach() * (1 - 5e-4 * 0.01), 0.01 * exact))
        opt.step()
        adamw.step()
        for p, (decayed, exact) in zip(matrices(net), expected):
            update = decayed - p
            cosine = torch.cosine_similarity(update.flatten(), exact.flatten(), dim=0)
            assert cosine > 0.97
            assert 0.7 < update.norm() / exact.norm() < 1.2

    others = {id(p) for p in matrices(net)}
    for p, p_reference in zip(net.parameters(), reference.parameters()):
        assert id(p) in others or torch.equal(p, p_reference)
    assert not torch.equal(matrices(net)[0], before[0])


def test_frozen_weights_and_those_without_a_gradient_stay_as_they_are():
    net = with_gradients(network())
    net[3].requires_grad_(False)
    net[0].weight.grad = None
    before = [p.detach().clone() for p in matrices(net)]
    trained = [p for p in net.parameters() if p.requires_grad]
    Muon(trained, [net], lr=1e-3, muon_lr=0.02, betas=(0.9, 0.99)).step()
    for p, p_before in zip(matrices(net), before):
        assert torch.equal(p, p_before)


def test_its_state_can_be_saved_and_filled_in_again():
    net, other = network(), network()
    opt = Muon(net.parameters(), [net], lr=1e-3, muon_lr=0.02, betas=(0.9, 0.99))
    with_gradients(net)
    opt.step()
    other.load_state_dict(net.state_dict())
    resumed = Muon(other.parameters(), [other], lr=1e-3, muon_lr=0.02, betas=(0.9, 0.99))
    fill_optimiser(resumed, copy.deepcopy(opt.state_dict()))
    for optimiser, its_net in ((opt, net), (resumed, other)):
        with_gradients(its_net)
        optimiser.step()
    for p, q in zip(net.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole = train_ldm.parse_args([*TINY, "--steps", "4", "--out", str(tmp_path / "whole")])
    train_ldm.main(whole)

    # The same run again, from its checkpoint after two steps.
    parts = [*TINY, "--steps", "4", "--save-every", "2", "--out", str(tmp_path / "parts")]
    train_ldm.main(train_ldm.parse_args(parts))
    (tmp_path / "parts" / "ckpt.old.pt").rename(tmp_path / "parts" / "ckpt.pt")
    assert load_checkpoint(tmp_path / "parts" / "ckpt.pt")["step"] == 2
    train_ldm.main(train_ldm.parse_args(parts))

    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("lr", ["0", "0.02"])
def test_stage_one_can_be_trained_by_it_too(tmp_path, lr):
    args = train_ae.parse_args([
        "--n-shapes", "40", "--batch", "4", "--steps", "2", "--eval-n", "0", "--muon", lr,
        "--out", str(tmp_path),
    ])
    train_ae.main(args)
    states = load_checkpoint(tmp_path / "ckpt.pt")["opts"]["ae"]["state"].values()
    assert any("momentum" in state for state in states) == (lr == "0.02")


def test_fsdp_refuses_muon(monkeypatch):
    args = train_ldm.parse_args([*TINY, "--fsdp"])
    two = dataclasses.replace(train_ldm.setup("cpu", "fp32"), world=2)
    monkeypatch.setattr(train_ldm, "setup", lambda *_: two)
    with pytest.raises(BadInput, match="--muon"):
        train_ldm.main(args)


@pytest.mark.parametrize("wrong", [
    {"COEFFICIENTS": (1.5, -0.5, 0.5)},
    {"N_STEPS": 1},
])
def test_a_wrong_polynomial_is_noticed(monkeypatch, wrong):
    for name, value in wrong.items():
        monkeypatch.setattr(muon, name, value)
    with pytest.raises(AssertionError):
        test_an_update_has_the_directions_of_the_svd_and_almost_equal_strengths((5, 30))
