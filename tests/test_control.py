"""beyond/control.py: the edges, the branch, and a text model that learns to follow edges."""
import pytest
import torch
from PIL import Image
from runs import assert_same_state
from torch.testing import assert_close

from tinyldm.beyond.control import (
    agreement,
    edges,
    kept_channels,
    on_latent_grid,
    time_features,
    way_down,
    with_control,
)
from tinyldm.engine.open import BUNDLED, open_model
from tinyldm.errors import BadInput
from tinyldm.unet import UNet, UNetConfig

# ---- edges


def square(colour=1.0):
    """A square of 6 x 6 on a 16 x 16 background of -1, (1, 3, 16, 16)."""
    x = -torch.ones(1, 3, 16, 16)
    x[:, :, 5:11, 5:11] = colour
    return x


def test_edges_are_the_outline_of_a_square():
    """The pixels at both sides of it, and none in its middle or far away."""
    found = edges(square())
    assert found.shape == (1, 1, 16, 16)
    outside = torch.zeros(16, 16, dtype=torch.bool)
    outside[4:12, 4:12] = True
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[6:10, 6:10] = True
    wanted = outside & ~inside
    corners = [(4, 4), (4, 11), (11, 4), (11, 11)]         # no neighbour in line is in the square
    for i, j in corners:
        wanted[i, j] = False
    assert torch.equal(found[0, 0].bool(), wanted)


def test_a_change_of_one_channel_is_an_edge_and_a_faint_one_is_none():
    x = -torch.ones(1, 3, 16, 16)
    x[:, 1, :, 8:] = 0.5
    assert edges(x)[0, 0, :, 7:9].all()
    assert edges(x).sum() == 32
    assert edges(square(-0.7)).sum() == 0


@pytest.mark.parametrize("f", [4, 8])
def test_each_place_of_the_grid_has_its_cells(f):
    """A mark in the cell (1, 2) of the place (0, 1) is channel 6 there."""
    h = w = 2
    edge_map = torch.zeros(1, 1, 4 * h, 4 * w)
    edge_map[0, 0, 1, 4 + 2] = 1
    if f == 8:                          # two pixels along a side of a cell
        edge_map = edge_map.repeat_interleave(2, 2).repeat_interleave(2, 3)
    grid = on_latent_grid(edge_map, h, w)
    assert grid.shape == (1, 16, 2, 2)
    assert grid[0, 6, 0, 1] == 1
    assert grid.sum() == 1


def test_agreement_is_1_for_the_same_edges_and_0_for_those_far_away():
    found = edges(square())
    assert agreement(found, found) == pytest.approx(1)
    assert agreement(found, found.roll(1, 3)) == pytest.approx(0.5, abs=0.25)
    far = torch.zeros_like(found)
    far[..., 0, 0] = 1
    assert agreement(far, found) == 0
    none = torch.zeros_like(found)
    assert agreement(none, found) == 0
    assert agreement(none, none) == 1


# ---- the branch

def test_kept_channels_are_those_that_the_unet_keeps():
    cfg = UNetConfig(4, 4, 8, 32, (1, 2), 2, (8,), 16, d_ctx=24, groups=8)
    net = UNet(cfg)
    z_t = torch.randn(1, 4, 8, 8)
    emb = time_features(net, z_t, torch.tensor([3]))
    kept, middle = way_down(net, z_t, emb, torch.randn(1, 5, 24))
    assert kept_channels(cfg) == [x.shape[1] for x in [*kept, middle]]


@pytest.fixture(scope="module")
def controlled():
    """The bundled toy model with an untrained branch. Only read it."""
    return with_control(open_model(BUNDLED["toy"]))


def call(model, edge_value):
    """Return eps_theta of a caption, with edges everywhere or nowhere."""
    image = torch.zeros(3, 32, 32)
    image[:, ::4] = edge_value
    item = {"caption": "a red circle", "image": image}
    y = model.task.encode({name: [item[name]] for name in model.task.fields})
    ctx = model.task.context(y, model.tau, model.ae)
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eps_theta()(z_t, torch.tensor([600]), ctx)


def test_an_untrained_branch_changes_nothing(controlled):
    """With edges and without, the model says what the text model says."""
    toy = open_model(BUNDLED["toy"])
    y = toy.task.encode({"caption": ["a red circle"]})
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = toy.eps_theta()(z_t, torch.tensor([600]), toy.task.context(y, toy.tau, toy.ae))
    for edge_value in (0.0, 1.0):
        assert_close(call(controlled, edge_value), wanted, rtol=1e-5, atol=1e-5)


def test_a_branch_that_has_learned_heeds_the_edges():
    model = with_control(open_model(BUNDLED["toy"]))
    torch.manual_seed(0)
    for conv in (model.unet.hint[2], *model.unet.zero):
        torch.nn.init.normal_(conv.weight, 0, 0.1)
    assert (call(model, 0.0) - call(model, 1.0)).abs().max() > 1e-3


@pytest.mark.parametrize("i", [0, 3, -1])
def test_each_output_that_is_kept_and_the_middle_is_corrected(i):
    """One of the convolutions behind the branch is enough to change what the model says."""
    model = with_control(open_model(BUNDLED["toy"]))
    before = call(model, 1.0)
    torch.nn.init.ones_(model.unet.zero[i].bias)
    assert (call(model, 1.0) - before).abs().max() > 1e-3


def test_a_model_has_one_branch_at_most(controlled):
    with pytest.raises(BadInput, match="it has a branch already"):
        with_control(controlled)


# ---- training and sampling

@pytest.fixture(scope="module")
def trained_control(trained, tmp_path_factory, cli):
    """The folder of a tiny model with a branch, trained for two long steps. Only read it."""
    out = tmp_path_factory.mktemp("control") / "ldm"
    cli("train_ldm.py", "--init", trained / "ldm/model.pt", "--control", "--steps", 2, "--batch", 4,
        "--lr", 0.05, "--n-shapes", 40, "--eval-n", 4, "--out", out)
    return out


def test_training_changes_the_branch_and_nothing_else(trained, trained_control):
    before = torch.load(trained / "ldm/model.pt", weights_only=True)["ema"]
    after = torch.load(trained_control / "ckpt.pt", weights_only=True)
    for networks in (after["nets"], after["ema"]):
        for key, x in before["unet"].items():
            assert_close(networks["unet"][f"base.{key}"], x.float(), rtol=0, atol=0)
        for key, x in before["tau"].items():
            assert_close(networks["tau"][key], x.float(), rtol=0, atol=0)
    zero = after["nets"]["unet"]["zero.0.weight"]
    assert zero.abs().sum() > 0


def test_it_goes_on_where_it_stopped(trained, trained_control, tmp_path, cli):
    start = ["train_ldm.py", "--init", trained / "ldm/model.pt", "--control", "--batch", 4,
             "--n-shapes", 40, "--eval-n", 0, "--no-cosine", "--out", tmp_path / "ldm"]
    cli(*start, "--steps", 1)
    output = cli(*start, "--steps", 2)
    assert "1 of 2 steps are done" in output
    cli(*start[:-1], tmp_path / "whole", "--steps", 2)
    assert_same_state(tmp_path / "ldm", tmp_path / "whole")


def test_it_samples_with_the_edges_of_an_image(trained_control, tmp_path, cli):
    empty = Image.new("RGB", (16, 16), "white")
    empty.save(tmp_path / "empty.png")
    empty.paste("black", (4, 4, 12, 12))
    empty.save(tmp_path / "edges.png")
    start = ["sample.py", "--ckpt", trained_control / "model.pt", "--steps", 2]
    for name in ("empty", "edges"):
        cli(*start, "--image", tmp_path / f"{name}.png", "--n", 2, "--out", tmp_path / name,
            "a cross")
    without, with_edges = (tmp_path / name / "000000.png" for name in ("empty", "edges"))
    assert without.read_bytes() != with_edges.read_bytes()
    cli(*start, "--n", 4, "--score", "--out", tmp_path / "y.png")           # held-out items
    output = cli(*start, "a cross", "--out", tmp_path / "z.png", code=2)
    assert "give an image, too" in output


def test_control_needs_a_model_to_start_from(trained, tmp_path, cli):
    output = cli("train_ldm.py", "--control", "--out", tmp_path / "x", code=2)
    assert "--control: only with --init" in output
    output = cli("train_ldm.py", "--control", "--init", trained / "ldm/model.pt", "--lora", 2,
                 "--out", tmp_path / "x", code=2)
    assert "only one of them" in output
