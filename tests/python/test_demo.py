"""examples/train_language_model.py, a tiny run of it."""

import re
import sys
from pathlib import Path

import pytest
import torch

for name in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(name)
sys.path.append(str(Path(__file__).parents[2] / "examples"))

from safetensors import safe_open  # noqa: E402

import train_language_model as demo  # noqa: E402
from language_model import Config, KeyValueCache, LanguageModel  # noqa: E402

TEXT = "".join(
    f"{number} bottles of beer on the wall, take one down, pass it around.\n" for number in range(300, 0, -1)
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LanguageModel(Config(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2, keep_window_size=8))  # fmt: skip
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.A.uniform_(-1, 1)
    return model


def test_the_whole_run(tmp_path, capsys):
    text, output = tmp_path / "song.txt", tmp_path / "output"
    text.write_text(TEXT)
    demo.main(["--quick", "--text", str(text), "--output", str(output), "--device", "cpu"])
    out = capsys.readouterr().out
    patterns = (r"loss: ([\d.]+)", r"([\d.]+) on text it has not seen", r"order-0 entropy of the text: ([\d.]+)")
    trained, unseen, entropy = (float(re.search(pattern, out)[1]) for pattern in patterns)
    assert trained < entropy - 0.5 and unseen < entropy - 0.5
    assert "the end of a prompt" in out
    assert re.search(r"a step of 512 bytes +[\d.]+ ms +[\d.]+ ms +[\d.]+ times as fast", out)
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(output / "model.safetensors", framework="pt") as file:
        config = Config(
            **{name: float(value) if "." in value else int(value) for name, value in file.metadata().items()}
        )
        LanguageModel(config).load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def test_order_0_entropy():
    assert demo.order_0_entropy(torch.tensor([1, 2, 3, 4] * 5)) == pytest.approx(2)
    assert demo.order_0_entropy(torch.tensor([7] * 9)) == pytest.approx(0)


def test_the_default_text_is_the_standard_library():
    text = bytes(demo.read_text(None, 1).tolist())
    assert b"def namedtuple(" in text and b"class TestCase" in text


def test_the_model_decodes_as_it_trains(model):
    tokens = torch.randint(256, (1, 30))
    cache = KeyValueCache()
    logits = [model(piece, cache) for piece in tokens.split([11, *[1] * 19], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns(model):
    tokens = torch.randint(256, (2, 31))
    demo.loss_of(model, tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "--text: there is no file"),
        ("", [], "has 0 bytes"),
        ("short", [], "has 5 bytes, and training needs at least"),
        (TEXT, ["--window", "0"], "--window must be between"),
        (TEXT, ["--steps", "-1"], "--steps must be positive, got -1"),
        (TEXT, ["--output", __file__], "File exists"),
    ],
)
def test_what_cannot_be_trained_on_is_said(tmp_path, capsys, content, arguments, message):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    with pytest.raises(SystemExit) as exit_status:
        demo.main(["--text", str(text), "--output", str(tmp_path / "output"), *arguments])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err
