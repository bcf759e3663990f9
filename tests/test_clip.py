"""metrics/clip.py against transformers' CLIPModel (tests/golden/clip.npz), and its figures.

The golden model is tiny, with pseudo-random weights: images of 32 px in patches of 8, 60 tokens.
"""
import json

import pytest
import torch
from goldens import close, golden, weights
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from tinyldm.engine.weights import write_state
from tinyldm.errors import BadInput
from tinyldm.metrics.clip import CLIP, MEAN, STD, clip_score, cmmd, open_clip

G = golden("clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as CLIP is published: weights, and a vocabulary of 60 tokens. Only read it."""
    path = tmp_path_factory.mktemp("clip")
    write_state(weights(G["recipe"]), path / "model.safetensors")
    words = ["red", "blue", "a", "circle", *(f"word{i}" for i in range(52)), "[UNK]", "<|pad|>"]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def clip(folder) -> CLIP:
    return open_clip(folder)[0]


# ---- the networks

def test_images_have_the_vectors_of_transformers(clip):
    """From pixels in CLIP's normalisation: turned back to [-1, 1], which may be left."""
    pixels = torch.from_numpy(G["in/pixels"])
    vectors = clip.project_image(clip.vision(pixels))
    close(vectors / vectors.norm(dim=1, keepdim=True), G["out/image"])


def test_captions_have_the_vectors_of_transformers(clip):
    """The two captions have 4 and 2 tokens before their end."""
    close(clip.texts(torch.from_numpy(G["in/ids"])), G["out/text"])


def test_images_are_normalised_and_cropped_as_clip_does(clip):
    """An image of another shape is its central square; a flat one is its colour."""
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    wide = torch.cat([torch.ones(1, 3, 32, 8), x, torch.ones(1, 3, 32, 8)], dim=3)
    close(clip.images(wide), clip.images(x))

    seen = []
    hook = clip.vision.register_forward_hook(lambda net, inputs, output: seen.append(inputs[0]))
    clip.images(torch.zeros(1, 3, 64, 64))              # 0 in [-1, 1] is 0.5 in 0..1
    hook.remove()
    wanted = [(0.5 - mean) / std for mean, std in zip(MEAN, STD)]
    close(seen[0][0, :, 3, 5], torch.tensor(wanted))
    assert seen[0].shape == (1, 3, 32, 32)


# ---- the figures

def test_the_score_is_the_mean_cosine_in_percent_and_never_below_0(folder):
    net, tokenizer = open_clip(folder)
    ids = torch.tensor([tokenizer.encode("a red circle").ids])
    text = net.texts(ids)
    assert clip_score(net, tokenizer, text, ["a red circle"]) == pytest.approx(100, abs=1e-3)
    assert clip_score(net, tokenizer, -text, ["a red circle"]) == 0
    both = torch.cat([text, -text])
    assert clip_score(net, tokenizer, both, ["a red circle"] * 2) == pytest.approx(50, abs=1e-3)


def test_cmmd_by_hand():
    """Two sets of one vector each, a distance of sqrt(2) apart: 2000 (1 - exp(-1 / 100))."""
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0]])
    wanted = 2000 * (1 - torch.tensor(-2 / 200.0).double().exp())
    assert cmmd(a, b) == pytest.approx(float(wanted), rel=1e-5)
    assert cmmd(a, a) == 0
    many = torch.nn.functional.normalize(torch.randn(1500, 4), dim=1)
    assert cmmd(many, many) == pytest.approx(0, abs=1e-6)


def save_images(path, n, caption=None):
    """Make a folder of n random images, with captions if one is given."""
    path.mkdir()
    lines = []
    for i in range(n):
        pixels = torch.randint(0, 255, (32, 32, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    if caption:
        (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def run_metrics(capsys, *flags, code=0):
    """Run python -m tinyldm.metrics, and return all that it prints."""
    from tinyldm.engine import command
    from tinyldm.metrics.__main__ import main, parse_args

    argv = [str(flag) for flag in flags]
    try:
        command.run(main, lambda: parse_args(argv))
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code
    printed = capsys.readouterr()
    assert exit_code == code, printed
    return printed.out + printed.err


def test_the_program_compares_by_clip_and_leaves_out_what_it_cannot_read(folder, tmp_path, capsys):
    real = save_images(tmp_path / "real", 6)
    fake = save_images(tmp_path / "fake", 6, "a red circle")
    (fake / "2.png").write_bytes(b"broken")
    output = run_metrics(capsys, "--real", real, "--fake", fake, "--clip", folder)
    assert "cmmd" in output
    assert "clip_score" in output

    output = run_metrics(capsys, "--real", fake, "--fake", real, "--clip", folder)
    assert "not all fake images have captions" in output
    assert "clip_score 1" not in output


def test_a_folder_without_clip_is_one_line(folder, tmp_path, capsys):
    images = save_images(tmp_path / "images", 4)
    command = ["--real", images, "--fake", images, "--clip", tmp_path / "none"]
    output = run_metrics(capsys, *command, code=2)
    assert "--clip: " in output
    assert "model.safetensors: no such file" in output

    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"vision_config": {"hidden_act": "gelu"}}')
    write_state({"x": torch.zeros(1)}, tmp_path / "other/model.safetensors")
    with pytest.raises(BadInput, match="only CLIP models like OpenAI's are read"):
        open_clip(tmp_path / "other")
    (tmp_path / "other/config.json").unlink()
    with pytest.raises(BadInput, match="not a CLIP of images and texts"):
        open_clip(tmp_path / "other")
