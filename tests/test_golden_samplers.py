"""samplers.py against trajectories of the official code and of diffusers (tests/golden).

Not compared: Stable Diffusion's DPM-Solver (it calls the net at fractional times),
quadratic timesteps, clipping.
"""
import numpy as np
import pytest
import torch
from goldens import close, golden

from tinyldm.conditioning import Context
from tinyldm.diffusion import cumulative, predict_z_0, sqrt_linear_betas
from tinyldm.guidance import guided
from tinyldm.samplers import (
    ddim,
    ddpm,
    dpm_solver_pp,
    masked,
    official_timesteps,
    plms,
    steps,
)

G = golden("samplers")
DIFFUSERS = golden("diffusers_schedulers")
ABAR = {
    "cin256": cumulative(sqrt_linear_betas(1000)),
    "txt2img_sd": cumulative(sqrt_linear_betas(1000, 0.00085, 0.012)),
}
TS = official_timesteps(ABAR["cin256"], 10)
Z_T = torch.from_numpy(G["in/x_T"])
X0 = torch.from_numpy(G["in/x0"])
MASK = torch.from_numpy(G["in/mask"])
CTX = Context(tokens=torch.from_numpy(G["in/context"]))
CTX_NULL = Context(tokens=torch.from_numpy(G["in/uncond_context"]))
DIFFUSERS_Z_T = torch.from_numpy(DIFFUSERS["in/x_T"])


class Net:
    """The analytic eps_theta of the reference runs, which also notes its inputs.

    Of a guided call, which has the null condition first, it notes the conditional half.
    """

    def __init__(self):
        self.z = []
        self.t = []

    def __call__(self, z, t, ctx=()):
        tokens = ctx[0] if ctx else None
        self.z.append(z[-2:])
        self.t.append(int(t[0]))
        eps = 0.3 * z + 0.1 * (t / 100).sin().view(-1, 1, 1, 1)
        if tokens is None:
            return eps
        return eps + 0.2 * tokens.mean(1)[:, :, None, None]

    def trajectory(self, z):
        """z after each step, given the last: the inputs of the calls after the first."""
        return torch.stack([*self.z[1:], z])


def noise(name="noise", scale=1.0):
    """Return a randn() that hands out the reference's noise."""
    rest = iter(torch.from_numpy(G[f"in/{name}"]))
    return lambda: scale * next(rest)


# ---- timesteps

def test_official_timesteps_are_make_ddim_timesteps():
    keys = [key for key in G if key.startswith("out/timesteps/uniform/")]
    assert keys
    for key in keys:
        ts = official_timesteps(ABAR["cin256"], int(key.split("/")[-1]))
        assert ts[-1] == 0
        assert ts[-2::-1] == G[key].tolist()


def test_official_timesteps_raise_where_the_official_rule_leaves_the_schedule():
    """For 599 of 1000 numbers of steps; others often differ from what was asked for."""
    bad = set()
    differ = set()
    for S in range(1, 1001):
        try:
            ts = official_timesteps(ABAR["cin256"], S)
        except ValueError as error:
            assert "timestep 1000 of 0..999" in str(error)
            bad.add(S)
        else:
            if len(ts) != S + 1:
                differ.add(S)
    few = {3, 9, 27, 36, 37}
    assert bad == few | {*range(101, 112), *range(251, 334), *range(501, 1001)}
    assert len(bad) == 599
    assert {30, 300, 400} <= bad | differ


@pytest.mark.parametrize("name", ABAR)
@pytest.mark.parametrize("S", [10, 50, 200])
def test_steps_have_the_official_alphas_and_end_at_abar_0(name, S):
    rows = steps(official_timesteps(ABAR[name], S), ABAR[name])[::-1]
    abar_t = [row[2] for row in rows]
    abar_s = [row[3] for row in rows]
    close(np.array(abar_t), G[f"out/params/{name}/{S}/eta0/ddim_alphas"])
    close(np.array(abar_s), G[f"out/params/{name}/{S}/eta0/ddim_alphas_prev"])


# ---- the official samplers

@pytest.mark.parametrize("name,run,eta,scale", [
    ("cin256", "eta0", 0.0, 1.0),
    ("cin256", "eta1", 1.0, 1.0),
    ("cin256", "eta0.5_temperature0.9", 0.5, 0.9),
    ("txt2img_sd", "eta0", 0.0, 1.0),
    ("txt2img_sd", "eta1", 1.0, 1.0),
])
def test_ddim(name, run, eta, scale):
    """Every step's z and predicted z_0; with eta > 0 noise enters the last step, too."""
    net = Net()
    abar = ABAR[name]
    ref = f"out/ddim_{name}_{run}"
    z = ddim(net, Z_T, (), abar, TS, noise(scale=scale), eta)
    close(net.trajectory(z), G[f"{ref}/x"])
    assert net.t == G[f"{ref}/model_times"].tolist()

    predicted = []
    for z_t, t in zip(net.z, net.t):
        eps = Net()(z_t, torch.tensor([t, t]))
        predicted.append(predict_z_0(z_t, eps, abar[t]))
    close(torch.stack(predicted), G[f"{ref}/pred_x0"])


@pytest.mark.parametrize("run,s", [("cond_eta0", 1.0), ("cfg3_eta0", 3.0)])
def test_ddim_with_a_condition_and_guidance(run, s):
    net = Net()
    z = ddim(guided(net, CTX_NULL, s), Z_T, CTX, ABAR["txt2img_sd"], TS)
    close(net.trajectory(z), G[f"out/ddim_txt2img_sd_{run}/x"])


def test_masked_ddim():
    """The known region (mask 1) is noised afresh before each step, but not after the last."""
    abar = ABAR["cin256"]
    after_steps = []

    def step(z, ts):
        after_steps.append(ddim(Net(), z, (), abar, ts))
        return after_steps[-1]

    z = masked(step, Z_T, X0, MASK, abar, TS, noise("q_noise"))
    assert z is after_steps[-1]
    close(torch.stack(after_steps), G["out/ddim_cin256_inpaint_eta0/x"])


@pytest.mark.parametrize("run", ["cin256", "txt2img_sd", "txt2img_sd_cfg3"])
def test_plms(run):
    """11 calls for 10 steps: the first step calls at both its ends."""
    net = Net()
    eps_theta = net
    ctx = ()
    if run.endswith("_cfg3"):
        eps_theta = guided(net, CTX_NULL, 3.0)
        ctx = CTX
    z = plms(eps_theta, Z_T, ctx, ABAR[run.removesuffix("_cfg3")], TS)
    assert net.t == G[f"out/plms_{run}/model_times"].tolist()
    assert len(net.t) == 11
    del net.z[1]                                    # the first step's other end
    close(net.trajectory(z), G[f"out/plms_{run}/x"])


@pytest.mark.parametrize("start,ts", [
    ("from999", range(999, 993, -1)), ("to0", range(4, -2, -1))
])
def test_ancestral_sampling(start, ts):
    net = Net()
    z_t = Z_T if start == "from999" else X0
    z = ddpm(net, z_t, (), ABAR["cin256"], list(ts), noise())
    close(net.trajectory(z), G[f"out/ancestral_latent_{start}/x"])
    assert net.t == G[f"out/ancestral_latent_{start}/t"].tolist()


# ---- those of diffusers

@pytest.mark.parametrize("run", ["dpmpp2m", "dpmpp2m_leading"])
def test_dpm_solver_pp_is_diffusers(run):
    """diffusers' default timesteps (999, 899, .., 100), and "leading" (901, 811, .., 91)."""
    net = Net()
    ts = DIFFUSERS[f"out/{run}/timesteps"].tolist()
    z = dpm_solver_pp(net, DIFFUSERS_Z_T, (), ABAR["txt2img_sd"], [*ts, -1])
    close(net.trajectory(z), DIFFUSERS[f"out/{run}/x"])
    assert net.t == ts


@pytest.mark.parametrize("run,eta", [("ddim", 0.0), ("ddim_eta1", 1.0)])
def test_ddim_is_diffusers(run, eta):
    net = Net()
    rest = iter(torch.from_numpy(DIFFUSERS["in/noise"]))
    abar = ABAR["txt2img_sd"]
    z = ddim(net, DIFFUSERS_Z_T, (), abar, TS, lambda: next(rest), eta)
    close(net.trajectory(z), DIFFUSERS[f"out/{run}/x"])
    assert net.t == DIFFUSERS[f"out/{run}/timesteps"].tolist()


def test_plms_is_diffusers_pndm():
    net = Net()
    z = plms(net, DIFFUSERS_Z_T, (), ABAR["txt2img_sd"], TS)
    del net.z[1]                                    # the first step's other end
    close(net.trajectory(z), DIFFUSERS["out/pndm/x"][1:])
