"""beyond/distill.py: what the teacher shows, and a tiny model that learns from it."""
import json

import gaussian
import pytest
import torch
from gaussian import ABAR
from runs import assert_same_state, log_rows
from test_model import model_of, of_gaussian_data
from torch.testing import assert_close

from tinyldm.beyond.distill import Teacher
from tinyldm.diffusion import q_sample
from tinyldm.engine.open import BUNDLED, open_model
from tinyldm.errors import BadInput
from tinyldm.guidance import guided
from tinyldm.samplers import ddim, ddim_step, timesteps


def teacher(S):
    """The best network for Gaussian data, as a teacher."""
    return Teacher(model_of(of_gaussian_data), S)


@pytest.mark.parametrize("S", [1, 3, 8])
def test_a_student_that_hits_its_targets_samples_as_the_teacher_does(S):
    """S steps with the targets' eps end where 2 S steps of the teacher end."""
    one = teacher(S)
    z_T = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = ddim(one.model.eps_theta(), z_T, (), ABAR, timesteps(ABAR, 2 * S))

    def student(z_t, t, ctx):
        z = z_t / ABAR[t].float().sqrt().view(-1, 1, 1, 1)
        return one.targets(z, t, torch.zeros_like(z), {})[1]        # q_sample of these is z_t

    assert_close(ddim(student, z_T, (), ABAR, timesteps(ABAR, S)), wanted, rtol=1e-3, atol=1e-3)


def test_the_targets_add_up_to_the_z_t_that_they_are_of():
    """At each t of the student, also where samples of a batch are at different ones."""
    one = teacher(5)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 3, 4, 4, generator=generator)
    eps = torch.randn(20, 3, 4, 4, generator=generator)
    t = one.draw(20, generator)
    z_0, eps_target = one.targets(z, t, eps, {})
    z_t = q_sample(z, t, eps, ABAR)
    assert_close(q_sample(z_0, t, eps_target, ABAR), z_t, rtol=1e-3, atol=1e-4)

    # The last step of the student ends at z_0: there the target is the teacher's last z_0.
    last = t == one.starts[-1]
    z_t = z_t[last]
    start, middle = one.starts[-1], one.middles[-1]
    z_m = ddim_step(z_t, gaussian.eps_theta(z_t, t[last]), ABAR[start], ABAR[middle])
    t_m = torch.full((len(z_m),), int(middle))
    z_end = ddim_step(z_m, gaussian.eps_theta(z_m, t_m), ABAR[middle], torch.ones(()))
    assert_close(z_0[last], z_end, rtol=1e-3, atol=1e-3)


def test_a_teacher_that_can_be_guided_is():
    """At its task's scale: the last step of a student of the toy ends where two guided ones do."""
    model = open_model(BUNDLED["toy"])
    one = Teacher(model, 4)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 8, 8, generator=generator)
    eps = torch.randn(2, 4, 8, 8, generator=generator)
    t = one.starts[[-1, -1]]
    y = model.task.encode({"caption": ["a red circle", "a blue square"]})
    z_0, _ = one.targets(z, t, eps, y)

    ctx = model.task.context(y, model.tau, model.ae)
    ctx_null = model.task.context(model.task.null(), model.tau, model.ae)
    assert model.default_scale() == 2
    eps_theta = guided(model.eps_theta(), ctx_null, 2.0)
    ts = [int(one.starts[-1]), int(one.middles[-1]), -1]
    wanted = ddim(eps_theta, q_sample(z, t, eps, model.abar), ctx, model.abar, ts)
    assert_close(z_0, wanted, rtol=1e-3, atol=1e-3)


def test_t_is_drawn_evenly_from_the_students_timesteps():
    one = teacher(4)
    t = one.draw(400, torch.Generator().manual_seed(0))
    assert t.unique(return_counts=True)[1].tolist() == [100] * 4
    assert set(t.tolist()) == set(timesteps(ABAR, 4)[:-1])


def test_more_steps_than_there_are_is_bad_input():
    with pytest.raises(BadInput, match="must be 1..1000"):
        teacher(501)


# ---- the whole road

@pytest.fixture(scope="module")
def distilled(trained, tmp_path_factory, cli):
    """The folder of a tiny model, distilled for two steps. Only read it."""
    out = tmp_path_factory.mktemp("distilled") / "ldm"
    command = ["train_ldm.py", "--init", trained / "ldm/model.pt", "--distill", 4, "--batch", 4,
               "--n-shapes", 40, "--no-cosine"]
    cli(*command, "--steps", 2, "--eval-n", 4, "--out", out)
    return out, command


def test_a_distilled_model_needs_no_guidance_and_few_steps(distilled, tmp_path, cli):
    out, _ = distilled
    cli("sample.py", "--ckpt", out / "model.pt", "--n", 2, "--out", tmp_path / "x", "a circle")
    settings = json.loads((tmp_path / "x/settings.json").read_text())
    assert settings["steps"] == 4
    assert settings["scale"] == 1
    for flags in (["--steps", 8], ["--sampler", "dpm++"], ["--eta", 1], ["--timesteps", "karras"]):
        output = cli("sample.py", "--ckpt", out / "model.pt", "--n", 1, *flags,
                     "--out", tmp_path / "x.png", "a circle")
        assert "has learned to sample in 4 even steps" in output
    rows = [row for row in log_rows(out) if "well_formed" in row or "prompts_followed" in row]
    assert rows and not any("held_out_loss_at_0" in row for row in rows)


def test_the_student_is_the_next_teacher(distilled, tmp_path, cli):
    out, command = distilled
    again = [out / "model.pt" if part == command[2] else part for part in command]
    again[again.index(4)] = 2
    cli(*again, "--steps", 1, "--eval-n", 0, "--out", tmp_path / "next")
    assert (tmp_path / "next/model.pt").exists()


def test_the_student_cannot_skip_a_halving(distilled, tmp_path, cli):
    out, _ = distilled
    output = cli("train_ldm.py", "--init", out / "model.pt", "--distill", 1, "--n-shapes", 40,
                 "--out", tmp_path / "x", code=2)
    assert "samples in 4 steps, so the next number is half of it" in output


def test_it_goes_on_bit_for_bit_with_the_same_teacher_only(distilled, tmp_path, cli):
    out, command = distilled
    for steps in (1, 2):
        cli(*command, "--steps", steps, "--eval-n", 0, "--out", tmp_path / "ldm")
    assert_same_state(out, tmp_path / "ldm")
    other = list(command)
    other[other.index("--distill") + 1] = 8
    output = cli(*other, "--steps", 2, "--eval-n", 0, "--out", out, code=2)
    assert "distill = 4, now it is 8" in output


def test_distillation_needs_a_model_and_does_nothing_else(trained, tmp_path, cli):
    output = cli("train_ldm.py", "--distill", 4, "--out", tmp_path / "x", code=2)
    assert "--distill: only with --init" in output
    output = cli("train_ldm.py", "--init", trained / "ldm/model.pt", "--distill", 4, "--lora", 2,
                 "--out", tmp_path / "x", code=2)
    assert "only one of them" in output
    output = cli("train_ldm.py", "--init", trained / "ldm/model.pt", "--distill", 4, "--draw-t",
                 "logit-normal", "--out", tmp_path / "x", code=2)
    assert "--draw-t: it has no effect with --distill" in output
    output = cli("train_ldm.py", "--init", trained / "ldm/model.pt", "--distill", 900,
                 "--out", tmp_path / "x", code=2)
    assert "--distill: steps 1800: must be 1..1000" in output
