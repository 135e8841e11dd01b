"""Trains a small language model with dynamic mask attention on real text, in minutes, on a CPU or a GPU.

    python examples/train_language_model.py                      # on the sources of Python's standard library
    python examples/train_language_model.py --text my.txt        # on your own text

It prints what the model learned, a sample, and what the dynamic mask saved against dense attention on this machine.
The model and a picture land in the output folder.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flash_dmattn import DynamicMask, get_available_backends
from flash_dmattn.integrations.flash_dynamic_mask_attention import flash_dynamic_mask_attention_forward
from language_model import Config, LanguageModel

BITS_PER_NAT = 1 / torch.tensor(2.0).log().item()
HELD_OUT = 0.05


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="file to learn from (default: Python's standard library sources)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the model and the picture")
    parser.add_argument("--minutes", type=float, default=2.5, help="how long to train")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--context", type=int, default=2048, help="bytes that the model sees at once")
    parser.add_argument("--window", type=int, default=128, help="keys that each query sees: keep_window_size")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step")
    parser.add_argument("--device", help="where to train (default: a GPU if this build can use it, else the CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that all works")
    options = parser.parse_args(arguments)
    config = Config(keep_window_size=options.window)
    if options.quick:
        config = Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, keep_window_size=32)  # fmt: skip
        options.context, options.steps = 128, options.steps or 60
    for name in ("minutes", "steps", "context", "batch"):
        if (value := getattr(options, name)) is not None and value <= 0:
            parser.error(f"--{name} must be positive, got {value}")
    if not 0 < config.keep_window_size < options.context:
        parser.error(f"--window must be between 1 and the context of {options.context}, got {options.window}")
    try:
        text = read_text(options.text, 2 * (options.context + 1))
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    torch.manual_seed(options.seed)
    device = torch.device(options.device) if options.device else best_device()
    text = text.to(device)
    held_out_from = min(int(len(text) * (1 - HELD_OUT)), len(text) - options.context - 1)
    train_text, held_out_text = text[:held_out_from], text[held_out_from:]
    model = LanguageModel(config).to(device)
    print(
        f"{len(text):,} bytes of {options.text or 'the Python standard library'}; "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; context {options.context}, "
        f"each query sees {config.keep_window_size} keys; on {device_name(device)}"
    )

    losses = train(model, train_text, options)
    held_out_loss = evaluate(model, held_out_text, options.context)
    print(
        f"\nloss: {mean_of_last(losses):.2f} bits per byte in training, {held_out_loss:.2f} on text it has not seen\n"
        f"order-0 entropy of the text: {order_0_entropy(text):.2f} bits per byte"
    )

    prompt = held_out_text[: options.context // 2]
    print(f"\n--- the end of a prompt, and after | what the model adds ---\n{sample(model, prompt, length=400)}\n---")
    print("what the dynamic mask saves, forward and backward:")
    print(f"{'':28}{'dynamic mask':>16}{'dense':>13}")
    for context in (options.context, 4 * options.context):
        print_savings(model, context, device)

    model_file, picture_file = options.output / "model.safetensors", options.output / "training.png"
    save_file(model.state_dict(), model_file, metadata={name: str(value) for name, value in vars(config).items()})
    draw(model, held_out_text[: options.context], losses, order_0_entropy(text), picture_file)
    print(f"\nmodel: {model_file}\npicture of the loss and of one head's dynamic mask: {picture_file}")


def read_text(path: Path | None, shortest: int) -> Tensor:
    """The bytes of a file, or of all sources of the standard library, as a tensor of token numbers."""
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("[a-z]*/*.py"))]
        data = b"\n".join(file.read_bytes() for file in files if file.parent.name not in ("site-packages", "test"))
        if not data:
            raise ValueError(f"no Python sources in {folder}: give a text with --text")
    elif not path.is_file():
        raise ValueError(f"--text: there is no file {path}")
    else:
        data = path.read_bytes()
    if len(data) < shortest:
        raise ValueError(f"--text: {path} has {len(data)} bytes, and training needs at least {shortest}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def best_device() -> torch.device:
    gpu_backends = [name for name in get_available_backends() if name != "cpu"]
    return torch.device("cuda" if torch.cuda.is_available() and gpu_backends else "cpu")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def mixed_precision(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


def train(model: LanguageModel, text: Tensor, options: argparse.Namespace) -> list[float]:
    """Trains for the steps or the minutes of `options`; returns the loss of every step in bits per byte."""
    optimizers = make_optimizers(model, text.device)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    seconds = options.minutes * 60
    total = options.steps or round(seconds)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=total, unit="step" if options.steps else "s", bar_format=BAR, dynamic_ncols=True) as bar:
        done = 0.0
        while done < 1:
            # A short warm-up, then down to nothing in a straight line.
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * min(1, (len(losses) + 1) / 20) * (1 - done)
            loss = loss_of(model, *batch(text, options.context, options.batch))
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item() * BITS_PER_NAT)

            elapsed = time.perf_counter() - start
            done = len(losses) / options.steps if options.steps else min(1.0, elapsed / seconds)
            tokens = len(losses) * options.batch * options.context
            loss_now, speed = mean_of_last(losses), tokens / elapsed
            bar.set_postfix_str(f"loss {loss_now:.2f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
            bar.update(round(done * total) - bar.n)
    return losses


def make_optimizers(model: LanguageModel, device: torch.device) -> list[torch.optim.Optimizer]:
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    others = list(set(model.parameters()) - set(matrices))
    # Muon learns most in few steps, and computes in bfloat16, which is slow on CPUs without it.
    if device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        optimizer = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(matrices, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return [optimizer, torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)]


BAR = "training {percentage:3.0f}% |{bar}| {elapsed} done, {remaining} left{postfix}"


def batch(text: Tensor, context: int, count: int) -> tuple[Tensor, Tensor]:
    """`count` random pieces of the text, and the byte that follows each byte."""
    starts = torch.randint(len(text) - context, (count,))
    pieces = torch.stack([text[start : start + context + 1] for start in starts]).long()
    return pieces[:, :-1], pieces[:, 1:]


def loss_of(model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
    with mixed_precision(tokens.device):
        logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def mean_of_last(losses: list[float], count: int = 20) -> float:
    return sum(losses[-count:]) / len(losses[-count:])


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor, context: int, pieces: int = 10) -> float:
    starts = torch.linspace(0, len(text) - context - 1, pieces).long().tolist()
    texts = (text[None, start : start + context + 1].long() for start in starts)
    return sum(loss_of(model, piece[:, :-1], piece[:, 1:]).item() for piece in texts) / pieces * BITS_PER_NAT


def order_0_entropy(text: Tensor) -> float:
    """Bits per byte of the best model that knows only how often each byte occurs."""
    frequency = torch.bincount(text.long(), minlength=256).double() / len(text)
    return -torch.special.xlogy(frequency, frequency).sum().item() * BITS_PER_NAT


def sample(model: LanguageModel, prompt: Tensor, length: int) -> str:
    generated = model.generate(prompt.long(), length)
    before, after = (bytes(tokens.tolist()).decode(errors="replace") for tokens in (prompt[-200:], generated))
    return f"{before}|{after}"


def print_savings(model: LanguageModel, context: int, device: torch.device) -> None:
    """Times a training step, and attention alone, with the dynamic mask and with torch's own dense attention."""
    config, dtype = model.config, torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens, targets = torch.randint(config.vocab_size, (2, 1, context), device=device)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (
        torch.randn(1, count, context, config.head_dim, device=device, dtype=dtype, requires_grad=True)
        for count in heads
    )
    score = torch.rand(key.shape[:3], device=device, requires_grad=True)
    bias = score[:, :, None, :].expand(-1, -1, context, -1)
    module = model.layers[0].attention

    def step() -> None:
        loss_of(model, tokens, targets).backward()

    def attend(function: Callable) -> Callable[[], None]:
        return lambda: function(module, query, key, value, None, bias)[0].sum().backward()

    step_time, attention_time = timed(step), timed(attend(flash_dynamic_mask_attention_forward))
    with dense_attention(model):
        dense_step_time, dense_attention_time = timed(step), timed(attend(dense_attention_forward))
    model.zero_grad(set_to_none=True)
    layers = config.num_hidden_layers
    for name, sparse, dense in (
        (f"a step of {context:,} bytes", step_time, dense_step_time),
        ("  of it, attention", layers * attention_time, layers * dense_attention_time),
    ):
        print(f"{name:28}{1e3 * sparse:13.1f} ms{1e3 * dense:10.1f} ms   {dense / sparse:.1f} times as fast")


def dense_attention_forward(module, query, key, value, attention_mask, attention_bias, **_) -> tuple[Tensor, None]:
    """Torch's own attention at its best: causal, no mask and no bias."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


def timed(run: Callable[[], None], repeats: int = 3, patience: float = 5) -> float:
    """Median seconds of the runs after one to warm up; fewer where they take long."""
    times: list[float] = []
    while len(times) < repeats + 1 and (len(times) < 2 or sum(times) < patience):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


@contextmanager
def dense_attention(model: LanguageModel) -> Iterator[None]:
    attentions = [layer.attention for layer in model.layers]
    for attention in attentions:
        attention.attention = dense_attention_forward
    try:
        yield
    finally:
        for attention in attentions:
            attention.attention = flash_dynamic_mask_attention_forward


@torch.no_grad()
def draw(model: LanguageModel, text: Tensor, losses: list[float], entropy: float, path: Path) -> None:
    """The loss curve, and which keys each query of `text` sees in the head that is least like a sliding window."""
    values: dict[int, Tensor] = {}
    hooks = [
        layer.attention.dt_proj.register_forward_hook(
            lambda _, inputs, __, index=index: values.update({index: inputs[0]})
        )
        for index, layer in enumerate(model.layers)
    ]
    model(text[None].long())
    for hook in hooks:
        hook.remove()
    scores = torch.cat([layer.attention.score(values[index])[0] for index, layer in enumerate(model.layers)])
    mask = DynamicMask.from_score(scores[None], model.config.keep_window_size)
    lifetime = (mask.end[0] - torch.arange(len(text), device=text.device)).float().std(dim=-1)
    chosen = int(lifetime.argmax())
    layer, head = divmod(chosen, model.config.num_key_value_heads)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    smooth = [mean_of_last(losses[: index + 1]) for index in range(len(losses))]
    left.plot(losses, color="tab:blue", alpha=0.3)
    left.plot(smooth, color="tab:blue", label="loss, mean of 20 steps")
    left.axhline(entropy, color="tab:gray", linestyle="--", label="order-0 entropy of the text")
    left.set(xlabel="step", ylabel="bits per byte", title="Training", ylim=(0, None))
    left.legend()
    dense = DynamicMask.from_score(scores[None, chosen, None], model.config.keep_window_size).to_dense()[0, 0]
    right.imshow(dense.cpu().numpy(), cmap="Blues", interpolation="antialiased")
    right.set(
        xlabel="key", ylabel="query",
        title=f"What the queries see: layer {layer}, KV head {head}, {model.config.keep_window_size} keys each",
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
