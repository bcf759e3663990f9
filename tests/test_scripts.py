"""The three scripts end to end: both stages train, resume, sample, refuse bad input in one line."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_AE, TINY_LDM, TINY_VQ
from PIL import Image

import sample
from tinyldm import shapes
from tinyldm.checkpoint import load_checkpoint
from tinyldm.generate import defaults, draw, load_model

@pytest.fixture(scope="module")
def trained(tmp_path_factory, cli):
    """A folder with a tiny autoencoder and LDM, 2 steps each, in ae/ and ldm/."""
    out = tmp_path_factory.mktemp("out")
    run = ["--steps", 2, "--size", 16]
    cli("train_ae.py", *TINY_AE, *run, "--out", out / "ae")
    cli("train_ldm.py", *TINY_LDM, *run, "--ae", out / "ae/ckpt.pt", "--out", out / "ldm")
    return out


def lines(path):
    return [json.loads(x) for x in (path / "log.jsonl").read_text().splitlines()]


def states(path):
    """Everything in a checkpoint that training made."""
    ckpt = torch.load(path / "ckpt.pt", weights_only=True)
    kept = ("step", "nets", "opts", "idle", "opt", "ema", "ema_n", "ae")
    return {k: ckpt[k] for k in kept if k in ckpt}


def test_both_stages_write_what_they_promise(trained):
    for stage, picture in (("ae", "recon_000002.png"), ("ldm", "samples_000002.png")):
        assert Image.open(trained / stage / picture).width > 100
        assert [x["step"] for x in lines(trained / stage)][:2] == [1, 2]
        assert not list((trained / stage).glob("*.part"))
    told = {"rec", "perceptual", "kl", "z_std", "lam", "disc", "d_real", "d_fake", "gnorm"}
    assert told <= lines(trained / "ae")[1].keys()
    assert any({"held_out_psnr", "captions_still_true"} <= x.keys() for x in lines(trained / "ae"))
    told = {"prompts_followed", "held_out_loss_at_0", "fd_shapes"}
    assert told <= lines(trained / "ldm")[-1].keys()
    ckpt = load_checkpoint(trained / "ldm/ckpt.pt", "ldm", "--ckpt")
    assert {"ae", "nets", "ema", "tokenizer", "config", "opt"} <= ckpt.keys()
    assert abs(lines(trained / "ldm")[0]["z_std"] - 1) < 0.3


def test_a_vq_model_goes_the_whole_road(tmp_path, cli):
    """Stage two and sampling need no word about it; codes are counted, restarted and written."""
    run = ["--size", 16, "--steps", 2]
    said = cli("train_ae.py", *TINY_VQ, *run, "--out", tmp_path / "ae")
    assert "codebook 128)" in said and "codes_used" in said
    told = lines(tmp_path / "ae")[1]
    assert {"rec", "codebook", "z_std", "codes_used", "perplexity", "lam"} <= told.keys()
    assert "kl" not in told and 1 <= told["perplexity"] <= told["codes_used"] <= 32
    ckpt = load_checkpoint(tmp_path / "ae/ckpt.pt", "autoencoder", "--ae")
    assert ckpt["nets"]["ae"]["codebook.codes"].shape == (32, 4)
    assert (ckpt["idle"] == 0).all() and ckpt["config"]["autoencoder"]["n_codes"] == 32
    cli("train_ldm.py", *TINY_LDM, *run, "--ae", tmp_path / "ae/ckpt.pt", "--out", tmp_path / "ldm")
    assert abs(lines(tmp_path / "ldm")[0]["z_std"] - 1) < 0.3
    cli("sample.py", "--ckpt", tmp_path / "ldm/model.pt", "--n", 1, "--steps", 3,
        "--out", tmp_path / "x.png", "a red circle")
    assert Image.open(tmp_path / "x.png").width > 90


def test_unused_codes_are_restarted_on_request_only(tmp_path, cli):
    used = []
    for n in (0, 1):
        cli("train_ae.py", *TINY_VQ, "--size", 16, "--steps", 6, "--disc-weight", 0,
            "--restart-codes", n, "--out", tmp_path / str(n))
        used.append(lines(tmp_path / str(n))[-2]["codes_used"])
    assert used[1] > used[0] + 5, used


@pytest.mark.parametrize("stage", ["ae", "vq", "ldm"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(trained, tmp_path, cli, stage):
    ldm = [*TINY_LDM, "--ae", trained / "ae/ckpt.pt", "--no-cache-latents"]
    flags = [*{"ae": TINY_AE, "vq": [*TINY_VQ, "--restart-codes", 3], "ldm": ldm}[stage],
             "--size", 16, "--no-cosine", "--save-every", 2, "--eval-every", 2]
    script = "train_ldm.py" if stage == "ldm" else "train_ae.py"
    cli(script, *flags, "--steps", 4, "--out", tmp_path / "whole")
    cli(script, *flags, "--steps", 2, "--out", tmp_path / "parts")
    said = cli(script, *flags, "--steps", 4, "--out", tmp_path / "parts")
    assert "2 of 4 steps are done" in said
    torch.testing.assert_close(states(tmp_path / "whole"), states(tmp_path / "parts"),
                               rtol=0, atol=0)
    timing = {"ms", "img_per_s", "gb", "eta_min"}
    whole, parts = ([{k: v for k, v in x.items() if k not in timing} for x in lines(tmp_path / k)]
                    for k in ("whole", "parts"))
    assert [x["step"] for x in whole if "fd_shapes" in x] == [2, 4] and whole == parts


def test_sigterm_saves_before_leaving(tmp_path, cli):
    run = [sys.executable, ROOT / "train_ae.py", *TINY_AE, "--size", "16", "--steps", "100000",
           "--save-every", "100000", "--out", tmp_path / "ae"]
    p = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "ae/log.jsonl").exists() or len(lines(tmp_path / "ae")) < 2:
        assert p.poll() is None
        time.sleep(0.1)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    assert p.returncode == 0
    step = load_checkpoint(tmp_path / "ae/ckpt.pt", "autoencoder", "--out")["step"]
    assert 2 <= step < 100_000 and lines(tmp_path / "ae")[-1]["step"] == step


def test_two_processes_train_together(tmp_path):
    """torchrun with gloo: both stages run, their weights stay equal on all ranks (one is saved)."""
    run = [sys.executable, "-m", "torch.distributed.run",
           "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for script, flags in (("train_ae.py", TINY_AE),
                          ("train_ldm.py", [*TINY_LDM, "--ae", tmp_path / "ae/ckpt.pt"])):
        p = subprocess.run([*run, ROOT / script, *map(str, flags), "--size", "16", "--steps", "2",
                            "--micro-batch", "1", "--out", tmp_path / script[6:-3]],
                           env=env, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
    assert load_checkpoint(tmp_path / "ldm/ckpt.pt", "ldm", "--ckpt")["step"] == 2


def test_two_processes_restart_the_same_codes_as_one(tmp_path, cli):
    """Without D_psi, whose BatchNorm sees one process only, the weights end up the same."""
    flags = [*TINY_VQ, "--size", "16", "--steps", "3", "--disc-weight", "0", "--micro-batch", "1"]
    cli("train_ae.py", *flags, "--out", tmp_path / "one")
    p = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                        "--nproc-per-node", "2", ROOT / "train_ae.py", *flags,
                        "--out", tmp_path / "two"], capture_output=True, text=True,
                       env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert p.returncode == 0, p.stderr
    one, two = (states(tmp_path / k) for k in ("one", "two"))
    torch.testing.assert_close(one["nets"]["ae"], two["nets"]["ae"], rtol=1e-4, atol=1e-4)
    assert len(one["nets"]["ae"]["codebook.codes"].unique(dim=0)) > 16


def test_a_real_folder_goes_the_whole_road(tmp_path, folder, cli):
    path = folder(40)
    cli("train_ae.py", *TINY_AE, "--data", path, "--size", 16, "--steps", 2,
        "--out", tmp_path / "ae", "--flip", "--workers", 1)
    cli("train_ldm.py", *TINY_LDM, "--data", path, "--size", 16, "--steps", 2,
        "--ae", tmp_path / "ae/ckpt.pt", "--out", tmp_path / "ldm", "--flip")
    said = cli("sample.py", "--ckpt", tmp_path / "ldm/model.pt", "--n", 2, "--steps", 3,
               "--out", tmp_path / "o.png", "picture 2 dog")
    assert "'dog'" in said and Image.open(tmp_path / "o.png").width > 100


def test_same_seed_same_picture_whatever_the_batch(trained, tmp_path, cli):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    for name, batch, flags in (("a", 64, []), ("b", 1, []), ("c", 64, ["--seed", 1])):
        cli("sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--prompts", prompts, "--n", 2,
            "--steps", 3, "--eta", 1, "--out", tmp_path / name, "--batch", batch, *flags)
    pictures = {k: [list(Image.open(p).convert("RGB").tobytes())
                    for p in sorted((tmp_path / k).glob("*.png"))] for k in "abc"}
    assert len(pictures["a"]) == 4
    for a, b, c in zip(*pictures.values()):
        assert max(abs(x - y) for x, y in zip(a, b)) <= 1
        assert max(abs(x - y) for x, y in zip(a, c)) > 8


def test_two_processes_write_the_bytes_of_one_and_resume_what_is_missing(tmp_path):
    """Each its own batches; only one tells. --resume draws batches again that lack a picture."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\na blue square\na big green cross above a small cyan circle\n")
    flags = ["--prompts", prompts, "--n", "3", "--batch", "2", "--steps", "3", "--eta", "1"]

    def run(way, *more):
        """With one thread each: another number of threads may round differently."""
        return subprocess.run([sys.executable, *way, ROOT / "sample.py", *flags, *more],
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)

    def torchrun(*more):
        return run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"],
                   *more)
    assert run([], "--out", tmp_path / "one").returncode == 0
    p = torchrun("--out", tmp_path / "two")
    assert p.returncode == 0 and p.stdout.count("9 picture(s)") == 1, p.stderr

    def files(name):
        return {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
    one = files("one")
    assert sorted(one) == [f"{i:06d}.png" for i in range(9)] and len(set(one.values())) == 9
    assert files("two") == one
    (tmp_path / "two/000005.png").unlink()
    for i in (1, 4):
        (tmp_path / f"two/{i:06d}.png").write_bytes(b"as it was")
    assert torchrun("--out", tmp_path / "two", "--resume").returncode == 0
    assert files("two") == one | {"000001.png": b"as it was"}       # batch 4, 5 is drawn anew
    assert "error: torchrun and --resume" in torchrun("--out", tmp_path / "x.png").stderr


def test_a_picture_alone_and_in_batches():
    """The same bits in one batch after another; to float's last digits in a batch of 1 or 3."""
    m = load_model(sample.BUNDLED, True, torch.device("cpu"))
    items = [{"caption": p} for p in shapes.prompts(6)]
    how = defaults(size=(32, 32), steps=5, eta=1)
    whole = draw(m, items, how)
    assert torch.equal(draw(m, items, how), whole)
    for k in (1, 3):
        parts = [draw(m, items[i:i + k], how, i) for i in range(0, 6, k)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_each_sampler_draws_its_own_picture_and_the_bar_counts_its_calls(tmp_path, cli):
    pictures, cases = set(), [
        (7, []), (7, ["--eta", 0.5]), (8, ["--timesteps", "official"]),
        (7, ["--sampler", "ddpm"]), (7, ["--sampler", "dpm++"]), (8, ["--sampler", "plms"])]
    for i, (calls, flags) in enumerate(cases):
        said = cli("sample.py", "--n", 1, "--steps", 7, "--out", tmp_path / f"{i}.png", *flags,
                   "a red circle above a blue square")
        assert f"{calls}/{calls} " in said
        pictures.add(Image.open(tmp_path / f"{i}.png").tobytes())
    assert len(pictures) == 6


@pytest.mark.parametrize("attention", [False, True])
def test_the_u_net_is_compiled_on_request(tmp_path, cli, monkeypatch, attention):
    """Once, by a backend that needs no compiler, for the same picture; not where hooks look on."""
    real, calls = torch.compile, []
    def compiled(f, **how):
        calls.append(f.__self__)
        return real(f, **how | {"backend": "eager"})
    monkeypatch.setattr(torch, "compile", compiled)
    more = ["--attention", tmp_path / "words.png"] if attention else []
    for name, flags in (("a", []), ("b", ["--compile"])):
        cli("sample.py", "--n", 1, "--steps", 3, "--out", tmp_path / f"{name}.png", *flags, *more,
            "a red circle above a blue square")
    assert [type(net).__name__ for net in calls] == ([] if attention else ["UNet"])
    a, b = (np.asarray(Image.open(tmp_path / f"{k}.png")).astype(int) for k in "ab")
    assert abs(a - b).max() <= 1


@pytest.mark.parametrize("flags", [["--sampler", "ddpm"], ["--no-ema"],
                                   ["--size", "32", "--scale", "1"]])
def test_sampling_flags(trained, tmp_path, cli, flags):
    cli("sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--n", 1, "--steps", 2,
        "--out", tmp_path / "x", *flags, "a red circle")
    side = Image.open(tmp_path / "x/000000.png").width
    assert side == (32 if "--size" in flags else 16)


def test_dry_run_prints_sizes_and_trains_nothing(tmp_path, trained, cli):
    said = cli("train_ae.py", "--dry-run", "--out", tmp_path / "ae", "--ch", 128,
               "--ch-mult", 1, 2, 4, 4, "--n-res", 2, "--groups", 32, "--c-z", 4, "--size", 256)
    assert "83,653,863" in said and "z (4, 32, 32)" in said and not (tmp_path / "ae").exists()
    said = cli("train_ae.py", "--dry-run", "--out", tmp_path / "ae", "--preset", "vq-f4")
    for part in ("55,322,782", "encoder 22,337,411", "decoder 32,960,771", "codebook 24,576",
                 "D_psi 2,765,633", "z (3, 64, 64)"):
        assert part in said
    said = cli("train_ldm.py", "--dry-run", "--ae", trained / "ae/ckpt.pt", "--size", 16)
    assert "parameters" in said


def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, cli):
    ae, ldm = trained / "ae/ckpt.pt", trained / "ldm/ckpt.pt"
    tiny = ["--size", 16, "--out", tmp_path / "out"]
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("\n")
    cases = [("train_ae.py", [*TINY_AE, "--size", 17, "--out", tmp_path],
              "--size 17 is not divisible by f = 2"),
             ("train_ae.py", [*TINY_AE, *tiny, "--data", tmp_path / "empty"], "no pictures"),
             ("train_ae.py", [*TINY_AE, "--size", 16, "--out", tmp_path / "file/x"], "file/x"),
             ("train_ae.py", [*TINY_AE, "--size", 16, "--out", trained / "ae", "--c-z", 5],
              "autoencoder c_z = 4, now it is 5"),
             ("train_ae.py", [*TINY_AE, *tiny, "--device", "cuda"], "no CUDA"),
             ("train_ae.py", [*TINY_AE, *tiny, "--lr", "1e30", "--steps", 30], "training stops"),
             ("train_ae.py", ["--no-such-flag"], "--no-such-flag"),
             ("train_ae.py", [*TINY_VQ, *tiny, "--n-codes", 0], "--n-codes 0"),
             ("train_ae.py", ["--preset", "kl-f8", "--out", tmp_path / "out"], "preset kl-f8"),
             ("train_ae.py", [*TINY_AE, "--size", 16, "--out", trained / "ae", "--reg", "vq"],
              "autoencoder n_codes = None, now it is 256"),
             ("train_ae.py", [*TINY_AE, "--size", 16, "--out", trained / "ae", "--attn-res", 8],
              "autoencoder attn_res = (), now it is (8,)"),
             ("train_ldm.py", [*TINY_LDM, *tiny, "--ae", ldm], "holds"),
             ("train_ldm.py", [*TINY_LDM, *tiny, "--ae", tmp_path / "gone.pt"], "--ae"),
             ("train_ldm.py", [*TINY_LDM, "--ae", ae, "--size", 18], "not a multiple of 4"),
             ("sample.py", ["--ckpt", ldm], "no prompt"),
             ("sample.py", ["--ckpt", ldm, "--prompts", tmp_path / "none.txt"], "no prompt"),
             ("sample.py", ["--ckpt", ldm, "--steps", 1001, "a red circle"],
              "--steps 1001: must be 1..1000"),
             ("sample.py", ["--ckpt", ldm, "--steps", 27, "--timesteps", "official", "a cross"],
              "--steps 27: the official rule would visit timestep 1000 of 0..999"),
             ("sample.py", ["--ckpt", ldm, "--eta", 1, "--sampler", "plms", "a cross"], "--eta 1"),
             ("sample.py", ["--ckpt", ldm, "--sampler", "euler", "a cross"], "--sampler"),
             ("sample.py", ["--ckpt", ldm, "--timesteps", "odd", "a cross"], "--timesteps"),
             ("sample.py", ["--ckpt", ldm, "--size", 18, "a red circle"], "--size 18"),
             ("sample.py", ["--ckpt", ae, "a red circle"], "holds"),
             ("sample.py", ["--ckpt", trained / "ldm/model.pt", "--no-ema", "a red circle"],
              "--no-ema"),
             ("sample.py", ["--ckpt", ldm, "--out", tmp_path / "file/x.png", "a red circle"],
              "cannot be written"),
             ("train_ldm.py", [*TINY_LDM, "--ae", ae, "--size", 16, "--fsdp"], "--fsdp: "),
             ("sample.py", ["--ckpt", ldm, "--score", "a dog"], "built-in world")]
    for script, flags, say in cases:
        said = cli(script, *flags, code=2)
        assert say in said, said
        assert "error: " in said.strip().splitlines()[-1], said


def test_bad_input_leaves_no_traceback(tmp_path):
    p = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", tmp_path / "gone.pt", "x"],
                       capture_output=True, text=True)
    assert p.returncode == 2 and p.stdout == "" and len(p.stderr.splitlines()) == 1
    assert p.stderr.startswith("error: --ckpt") and "gone.pt: No such file" in p.stderr


def test_a_checkpoint_whose_parts_do_not_fit_is_bad_input(trained, tmp_path, cli):
    ckpt = torch.load(trained / "ldm/model.pt", weights_only=True)
    for name, broken in (("config", {}), ("tokenizer", "{"), ("ema", {"unet": {}, "tau": {}})):
        torch.save(ckpt | {name: broken}, tmp_path / "x.pt")
        assert "do not fit together" in cli("sample.py", "--ckpt", tmp_path / "x.pt", "a", code=2)


def test_a_checkpoint_of_absurd_sizes_is_not_built(tmp_path, cli):
    """Neither by more layers than time allows, nor by wider ones than memory does."""
    ckpt = torch.load(sample.BUNDLED, weights_only=True)
    for part, k, v, say in (("unet", "n_res", 10 ** 6, "absurd"), ("tau", "depth", 100, "absurd"),
                            ("unet", "ch_mult", [1] * 1000, "absurd"),
                            ("schedule", "T", 10 ** 9, "absurd"),
                            ("unet", "ch", 48 * 10 ** 4, "do not fit together"),
                            ("autoencoder", "ch", 32 * 10 ** 4, "do not fit together")):
        config = ckpt["config"] | {part: ckpt["config"][part] | {k: v}}
        torch.save(ckpt | {"config": config}, tmp_path / "x.pt")
        assert say in cli("sample.py", "--ckpt", tmp_path / "x.pt", "a", code=2)
    torch.save(ckpt | {"args": ckpt["args"] | {"p_drop": 0.0}}, tmp_path / "x.pt")
    flags = ["--ckpt", tmp_path / "x.pt", "--steps", 1, "--n", 1, "--out", tmp_path / "x", "a"]
    assert "no null condition" in cli("sample.py", *flags, "--scale", 2, code=2)
    cli("sample.py", *flags)


def test_the_bundled_model_is_small_and_draws(tmp_path, cli):
    assert sample.BUNDLED.stat().st_size < 8e6
    cli("sample.py", "a red circle above a blue square", "--n", 2, "--steps", 5, "--out", tmp_path)
    assert np.asarray(Image.open(tmp_path / "000001.png")).std() > 5
