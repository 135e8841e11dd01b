"""Models of transformers give with this attention what they give with their own. All are tiny and random."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reference

transformers = pytest.importorskip("transformers")

from flash_dmattn.integrations import flash_dynamic_mask_attention, register_attention  # noqa: E402
from flash_dmattn.integrations.cache import DynamicMaskCache  # noqa: E402
from flash_dmattn.integrations.doge import patch_doge  # noqa: E402

VOCABULARY, LENGTH, WINDOW = 512, 40, 8
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def randomize(model):
    """Weights large enough for attention to matter; in Doge models, scores that differ between keys."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            elif name.split(".")[-1] == "A":
                parameter.uniform_(-1.5, 1.5)
    return model.eval()


def doge(**config):
    config = transformers.DogeConfig(**{**SIZES, "keep_window_size": WINDOW, **config})
    config._attn_implementation = "eager"
    return randomize(transformers.DogeForCausalLM(config))


@pytest.fixture
def tokens():
    """(2, LENGTH), all different: equal ones have equal scores in the first layer, where torch.topk may take either."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCABULARY - 1, generator=generator)[:LENGTH] + 1 for _ in range(2)])


@pytest.fixture
def left_padding():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :11] = 0
    return mask


def no_padding():
    return torch.ones(2, LENGTH, dtype=torch.long)


def assert_close(got, expected, name, **tolerance):
    torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}", **tolerance)


# The usage example of the reference implementation's API documentation, as it stands there.


def reference_module(attention=None):
    code = (Path(__file__).parent / "data" / "dynamic_mask_attention.txt").read_text()
    # No Python has a typing.tuple; the builtin is what it means.
    code = code.replace("import Optional, Callable, tuple\n", "import Optional, Callable\n")
    from transformers.models.doge import modeling_doge

    needed = ("DogeRMSNorm", "apply_rotary_pos_emb", "eager_attention_forward")
    names = {name: getattr(modeling_doge, name) for name in needed}
    exec(code, names)
    if attention is not None:
        names["flash_dynamic_mask_attention_forward"] = attention
    config = transformers.DogeConfig(**SIZES, keep_window_size=WINDOW)
    module = randomize(names["DynamicMaskAttention"](config, layer_idx=0))
    rotary = modeling_doge.DogeRotaryEmbedding(config)
    return module, rotary


def random_hidden():
    return torch.randn(2, LENGTH, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))


def plain_attention(module, query, key, value, attention_mask, attention_bias, scale):
    """The same attention from the definitions."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    score = attention_bias[:, :, 0].detach()
    if attention_mask is None:
        attention_mask = reference.causal_mask(query.shape[1], key.shape[1]).expand(*score.shape[:2], -1, -1)
    visible = reference.select(score, attention_mask, module.keep_window_size)
    return reference.attention(query, key, value, attention_bias, visible, scale=scale)[0], None


@pytest.mark.parametrize("with_mask", [False, True])
def test_the_reference_documentation_example_runs(with_mask):
    mask = None
    if with_mask:
        mask = reference.causal_mask(LENGTH, LENGTH)[None, None].repeat(2, 1, 1, 1)
        mask[0, :, :, :11] = False
    results = []
    for attention in (None, plain_attention):
        module, rotary = reference_module(attention)
        hidden = random_hidden().requires_grad_()
        positions = rotary(hidden, torch.arange(LENGTH)[None])
        out, weights = module(hidden, positions, attention_mask=mask)
        assert weights is None
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()} | {"hidden": hidden.grad}
        results.append((out, gradients))
    (out, gradients), (expected_out, expected_gradients) = results
    torch.testing.assert_close(out, expected_out)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name
        assert_close(gradient, expected_gradients[name], name, rtol=1e-4, atol=1e-5)


def test_the_reference_documentation_example_decodes_with_a_cache():
    module, rotary = reference_module()
    hidden = random_hidden()
    cos, sin = rotary(hidden, torch.arange(LENGTH)[None])
    whole, _ = module(hidden, (cos, sin))
    cache, pieces = transformers.DynamicCache(), []
    for start, stop in [(0, 25), *((position, position + 1) for position in range(25, LENGTH))]:
        at = slice(start, stop)
        pieces.append(module(hidden[:, at], (cos[:, at], sin[:, at]), past_key_value=cache)[0])
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


# register_attention


MODELS = {
    "grouped heads": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "softcap and sliding windows": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SIZES, head_dim=8, attn_logit_softcapping=2.0, sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "bidirectional": lambda: transformers.BertModel(transformers.BertConfig(**{**SIZES, "is_decoder": False})),
    "position bias, cross attention": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                              decoder_start_token_id=0, dropout_rate=0.0)
    ),
    "Doge, its mask as a bias": doge,
}  # fmt: skip


def output(model, tokens, mask):
    extra = {"decoder_input_ids": tokens[:, :9]} if model.config.is_encoder_decoder else {}
    result = model(tokens, attention_mask=mask, **extra)
    out = result.logits if "logits" in result else result.last_hidden_state
    return out if model.config.is_encoder_decoder else out[mask.bool()]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_give_what_they_gave(make, padded, tokens, left_padding):
    register_attention()
    model = randomize(make())
    mask = left_padding if padded else no_padding()
    model.set_attn_implementation("eager")
    expected = output(model, tokens, mask)
    model.set_attn_implementation("flash_dmattn")
    if model.config._attn_implementation == "eager":
        pytest.skip("this transformers cannot exchange the attention of this model")
    torch.testing.assert_close(output(model, tokens, mask), expected, rtol=1e-4, atol=1e-5)


def test_a_model_is_made_with_this_attention_by_name(tokens, left_padding):
    register_attention()
    register_attention()  # again is harmless
    config = transformers.LlamaConfig(**SIZES)
    model = randomize(transformers.LlamaForCausalLM._from_config(config, attn_implementation="flash_dmattn"))
    assert model.config._attn_implementation == "flash_dmattn"
    generated = generate(model, tokens, left_padding)
    model.set_attn_implementation("eager")
    assert torch.equal(generated, generate(model, tokens, left_padding))


def test_packed_sequences_see_themselves_alone(tokens):
    register_attention()
    model = randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    model.set_attn_implementation("flash_dmattn")
    lengths = [17, 23]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(tokens[:1], position_ids=positions, use_cache=False).logits
    apart = [model(piece).logits for piece in tokens[:1].split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1), rtol=1e-4, atol=1e-5)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    by_lengths = model(tokens[:1], position_ids=positions, **lengths).logits
    torch.testing.assert_close(by_lengths, packed)


def test_what_this_attention_cannot_do_is_refused():
    from flash_dmattn.integrations.attention_interface import attention_forward

    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="s_aux"):
        attention_forward(SimpleNamespace(), query, query, query, None, s_aux=torch.zeros(2))


# patch_doge


def generate(model, tokens, mask, **options):
    options = {"max_new_tokens": 30, "do_sample": False, **options}
    return model.generate(tokens, attention_mask=mask, pad_token_id=0, **options)


@pytest.mark.parametrize("padded", [False, True])
def test_a_patched_doge_gives_what_it_gave(padded, tokens, left_padding):
    model = doge()
    patched = patch_doge(copy.deepcopy(model))
    mask = left_padding if padded else no_padding()
    labels = tokens.masked_fill(mask.cumsum(1) <= 1, -100)  # padding, and the token that padding would predict
    results = []
    for each in (model, patched):
        result = each(tokens, attention_mask=mask, labels=labels)
        result.loss.backward()
        results.append((result.logits[mask.bool()], {name: p.grad for name, p in each.named_parameters()}))
    (logits, gradients), (patched_logits, patched_gradients) = results
    torch.testing.assert_close(patched_logits, logits, rtol=1e-4, atol=1e-4)
    assert gradients["model.layers.0.self_attn.A"].abs().min() > 0
    for name, gradient in gradients.items():
        assert_close(patched_gradients[name], gradient, name, rtol=1e-3, atol=1e-5)


def test_a_patched_doge_keeps_its_weights_and_their_names():
    model = doge()
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert patch_doge(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("padded", [False, True])
def test_a_patched_doge_makes_no_mask_of_queries_and_keys(padded, tokens, left_padding, monkeypatch):
    model = patch_doge(doge())
    seen = []
    forward = type(model.model.layers[0].self_attn).forward

    def spy(self, *args, attention_mask=None, **kwargs):
        seen.append(attention_mask)
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", spy)
    model(tokens, attention_mask=left_padding if padded else no_padding())
    if padded:
        assert all(torch.equal(mask, left_padding.bool()) for mask in seen)
    else:
        assert seen == [None, None]


def test_a_patched_doge_with_a_sliding_window(tokens, left_padding):
    model = doge(sliding_window=12)
    expected = model(tokens, attention_mask=left_padding).logits
    logits = patch_doge(model)(tokens, attention_mask=left_padding).logits
    torch.testing.assert_close(logits[left_padding.bool()], expected[left_padding.bool()], rtol=1e-4, atol=1e-4)


def test_an_untrained_doge_starts_as_sliding_window_attention(tokens):
    model = doge()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.zero_()
    logits = patch_doge(model)(tokens).logits
    windowed = doge(sliding_window=WINDOW, keep_window_size=LENGTH)
    windowed.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits, windowed(tokens).logits, rtol=1e-4, atol=1e-4)


def test_patch_doge_wants_a_doge():
    with pytest.raises(TypeError, match=r"model must contain .* got Linear"):
        patch_doge(torch.nn.Linear(2, 2))


# DynamicMaskCache


@pytest.fixture
def patched():
    return patch_doge(doge())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}], ids=lambda options: str(options))
def test_generation_with_w_rows_gives_the_same_tokens(patched, tokens, left_padding, padded, options):
    mask = left_padding if padded else no_padding()
    cache = DynamicMaskCache(WINDOW)
    generated = generate(patched, tokens, mask, past_key_values=cache, **options)
    options.pop("prefill_chunk_size", None)
    assert torch.equal(generated, generate(patched, tokens, mask, **options))
    assert cache.get_seq_length() == LENGTH + 29
    assert [layer.keys.shape[2] for layer in cache.layers] == [WINDOW, WINDOW]
    # Nor is there a larger tensor behind what is kept.
    assert all(layer.keys.untyped_storage().nbytes() == layer.keys.nbytes for layer in cache.layers)


def test_the_prompt_may_be_shorter_than_the_window(patched, tokens, left_padding):
    generated = generate(patched, tokens[:, 9:13], left_padding[:, 9:13], past_key_values=DynamicMaskCache(WINDOW))
    assert torch.equal(generated, generate(patched, tokens[:, 9:13], left_padding[:, 9:13]))


@pytest.mark.parametrize("scores", ["different", "equal", "few values"])
def test_logits_with_w_rows_are_those_of_the_whole_sequence(patched, tokens, scores, monkeypatch):
    """Whatever the pieces in which it comes, and with ties, which go by position."""
    if scores != "different":
        steps = 0 if scores == "equal" else 3
        attention = type(patched.model.layers[0].self_attn)
        score = attention.score
        monkeypatch.setattr(attention, "score", lambda *args: (score(*args) * steps).round() / max(steps, 1))
    expected = patched(tokens).logits
    cache = DynamicMaskCache(WINDOW)
    logits = [patched(piece, past_key_values=cache).logits for piece in tokens.split([3, 1, 12, 1, 1, 2, 20], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_is_used_again_after_reset(patched, tokens):
    cache = DynamicMaskCache(WINDOW)
    first = patched(tokens[:1], past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(patched(tokens[:1], past_key_values=cache).logits, first)


def test_batch_operations_of_the_cache(patched, tokens):
    cache = DynamicMaskCache(WINDOW)
    patched(tokens, past_key_values=cache)
    keys = cache.layers[1].keys
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].keys, keys.repeat_interleave(2, dim=0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache.layers[1].keys, keys[[1, 0]]) and cache.layers[1].scores.shape == (2, 2, WINDOW)


@pytest.mark.parametrize("window", [0, -1, 2.5, None])
def test_the_window_of_a_cache_is_checked(window):
    with pytest.raises(ValueError, match="keep_window_size must be a positive integer"):
        DynamicMaskCache(window)


def test_a_model_that_gives_no_scores_cannot_use_the_cache(tokens):
    with pytest.raises(TypeError, match="patch_doge"):
        doge()(tokens, past_key_values=DynamicMaskCache(WINDOW))


def test_what_the_cache_cannot_do_is_refused(patched, tokens):
    cache = DynamicMaskCache(WINDOW)
    patched(tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    windowed = patch_doge(doge(sliding_window=12))
    with pytest.raises(ValueError, match="DynamicMaskCache needs a causal mask"):
        windowed(tokens, past_key_values=DynamicMaskCache(WINDOW))


def test_importing_the_integration_does_not_import_transformers():
    assert not hasattr(flash_dynamic_mask_attention, "transformers")
