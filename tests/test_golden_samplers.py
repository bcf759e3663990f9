"""samplers.py against trajectories of the official code and of diffusers (tests/golden).

Not compared: SD's DPM-Solver (it asks the net at fractional times), quadratic timesteps, clipping.
"""
import numpy as np
import pytest
import torch
from goldens import close, golden

from tinyldm import samplers as s
from tinyldm.diffusion import cumulative, predict_z_0, sqrt_linear_betas
from tinyldm.guidance import guided

G, H = golden("samplers"), golden("diffusers_schedulers")
ABAR = {k: cumulative(sqrt_linear_betas(1000, *ends)) for k, ends in
        (("cin256", ()), ("txt2img_sd", (0.00085, 0.012)))}
Z_T, NOISE, CTX, CTX_NULL, X0, MASK = (torch.from_numpy(G[f"in/{k}"]) for k in (
    "x_T", "noise", "context", "uncond_context", "x0", "mask"))
TS = s.official_timesteps(1000, 10)


class Net:
    """The analytic eps_theta of the reference runs, which also notes what it is asked."""

    def __init__(self):
        self.z, self.t = [], []

    def __call__(self, z, t, ctx=None):
        self.z.append(z[:2] if ctx is None else z[-2:])
        self.t.append(int(t[0]))
        eps = 0.3 * z + 0.1 * (t / 100).sin().view(-1, 1, 1, 1)
        return eps if ctx is None else eps + 0.2 * ctx.mean(1)[:, :, None, None]

    def trajectory(self, z):
        """z after each step, given the last: what the net was asked next."""
        return torch.stack([*self.z[1:], z])


def noise(name="noise", scale=1.0):
    """randn that hands out the reference's noise."""
    rest = iter(torch.from_numpy(G[f"in/{name}"]))
    return lambda: scale * next(rest)


def test_official_timesteps_are_make_ddim_timesteps():
    for k in (k for k in G if k.startswith("out/timesteps/uniform/")):
        ts = s.official_timesteps(1000, int(k.split("/")[-1]))
        assert ts[-1] == 0 and ts[-2::-1] == G[k].tolist()


def test_official_timesteps_raise_where_the_official_rule_leaves_the_schedule():
    """For 599 of 1000 numbers of steps, and outside 1..1000; others often differ from S."""
    bad, other = set(), set()
    for S in range(1, 1001):
        try:
            if len(s.official_timesteps(1000, S)) != S + 1:
                other.add(S)
        except ValueError as e:
            assert "timestep 1000 of 0..999" in str(e)
            bad.add(S)
    assert bad == {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}
    assert len(bad) == 599 and {30, 300, 400} - bad - other == set()
    for S in (0, -1, 1001):
        with pytest.raises(ValueError, match="1..1000"):
            s.official_timesteps(1000, S)


@pytest.mark.parametrize("name", ABAR)
@pytest.mark.parametrize("S", [10, 50, 200])
def test_pairs_give_the_official_alphas_and_end_at_abar_0(name, S):
    _, abar_t, abar_s = zip(*s.pairs(s.official_timesteps(1000, S), ABAR[name])[::-1])
    close(np.array(abar_t), G[f"out/params/{name}/{S}/eta0/ddim_alphas"])
    close(np.array(abar_s), G[f"out/params/{name}/{S}/eta0/ddim_alphas_prev"])


@pytest.mark.parametrize("name,run,eta,scale", [
    ("cin256", "eta0", 0.0, 1.0), ("cin256", "eta1", 1.0, 1.0),
    ("cin256", "eta0.5_temperature0.9", 0.5, 0.9),
    ("txt2img_sd", "eta0", 0.0, 1.0), ("txt2img_sd", "eta1", 1.0, 1.0)])
def test_ddim(name, run, eta, scale):
    """Every step's z and predicted z_0; with eta > 0 noise enters the last step too."""
    net, run, abar = Net(), f"out/ddim_{name}_{run}", ABAR[name]
    z = s.ddim(net, Z_T, None, abar, TS, noise(scale=scale), eta)
    close(net.trajectory(z), G[f"{run}/x"])
    assert net.t == G[f"{run}/model_times"].tolist()
    z_0 = [predict_z_0(z, Net()(z, torch.tensor([t, t])), abar[t]) for z, t in zip(net.z, net.t)]
    close(torch.stack(z_0), G[f"{run}/pred_x0"])


@pytest.mark.parametrize("run,scale", [("cond_eta0", 1.0), ("cfg3_eta0", 3.0)])
def test_ddim_with_a_condition_and_guidance(run, scale):
    net, abar = Net(), ABAR["txt2img_sd"]
    z = s.ddim(guided(net, CTX_NULL, scale), Z_T, CTX, abar, TS)
    close(net.trajectory(z), G[f"out/ddim_txt2img_sd_{run}/x"])


def test_masked_ddim():
    """The known region (mask 1) is noised afresh before each step; the last step is not masked."""
    out = []

    def step(z, ts):
        out.append(s.ddim(Net(), z, None, ABAR["cin256"], ts))
        return out[-1]
    z = s.masked(step, Z_T, X0, MASK, ABAR["cin256"], TS, noise("q_noise"))
    assert z is out[-1]
    close(torch.stack(out), G["out/ddim_cin256_inpaint_eta0/x"])


@pytest.mark.parametrize("run,scale", [("cin256", None), ("txt2img_sd", None),
                                       ("txt2img_sd_cfg3", 3.0)])
def test_plms(run, scale):
    """11 calls for 10 steps: the first step calls at both ends, the same z is not asked twice."""
    net, abar = Net(), ABAR[run.removesuffix("_cfg3")]
    eps_theta = guided(net, CTX_NULL, scale) if scale else net
    z = s.plms(eps_theta, Z_T, CTX if scale else None, abar, TS)
    assert net.t == G[f"out/plms_{run}/model_times"].tolist() and len(net.t) == 11
    del net.z[1]                                    # the first step's other end
    close(net.trajectory(z), G[f"out/plms_{run}/x"])


@pytest.mark.parametrize("start,ts", [("from999", range(999, 993, -1)), ("to0", range(4, -2, -1))])
def test_ancestral_sampling(start, ts):
    net = Net()
    z = s.ddpm(net, Z_T if start == "from999" else X0, None, ABAR["cin256"], list(ts), noise())
    close(net.trajectory(z), G[f"out/ancestral_latent_{start}/x"])
    assert net.t == G[f"out/ancestral_latent_{start}/t"].tolist()


@pytest.mark.parametrize("run", ["dpmpp2m", "dpmpp2m_leading"])
def test_dpm_solver_pp_is_diffusers(run):
    """diffusers' default timesteps (999, 899, .., 100), and "leading" (901, 811, .., 91)."""
    net, ts = Net(), H[f"out/{run}/timesteps"].tolist()
    z = s.dpm_solver_pp(net, torch.from_numpy(H["in/x_T"]), None, ABAR["txt2img_sd"], [*ts, -1])
    close(net.trajectory(z), H[f"out/{run}/x"])
    assert net.t == ts


@pytest.mark.parametrize("run,eta", [("ddim", 0.0), ("ddim_eta1", 1.0)])
def test_ddim_is_diffusers(run, eta):
    net, rest = Net(), iter(torch.from_numpy(H["in/noise"]))
    z = s.ddim(net, torch.from_numpy(H["in/x_T"]), None, ABAR["txt2img_sd"], TS,
               lambda: next(rest), eta)
    close(net.trajectory(z), H[f"out/{run}/x"])
    assert net.t == H[f"out/{run}/timesteps"].tolist()


def test_plms_is_diffusers_pndm():
    net = Net()
    z = s.plms(net, torch.from_numpy(H["in/x_T"]), None, ABAR["txt2img_sd"], TS)
    del net.z[1]
    close(net.trajectory(z), H["out/pndm/x"][1:])
