"""LoRA against the plain formula and peft; merged and unmerged."""

import copy

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from torch import nn

from clip import build_model
from clip.lora import apply_lora, merged_lora, set_dropout
from clip.model import Attention
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts

# torch 2.4's own, when it recomputes a chunk of the text
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
CLOSE = dict(rtol=1e-10, atol=1e-10)
WIDTH, HEADS = 64, 4
both_configs = pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])


def attentions(model):
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def tiny(dtype=torch.float64, config=TINY_VIT):
    """A model, uint8 images and tokens of prompts for it."""
    model = build_model(random_state_dict(config)).to(dtype)
    side = config["image_resolution"]
    images = torch.randint(256, (3, 3, side, side), dtype=torch.uint8)
    return model, images, tokenize_class_prompts(model, ["a", "bcdefgh", "ij", "klm"], ["{}"])


def apply_trained_lora(model, layers, **kwargs):
    """Apply LoRA, and give A and B values as training might have left them."""
    params = apply_lora(model, layers, **kwargs)
    for p in params.values():
        p.data.normal_(std=0.2)
    return params


def features(model, images, tokens):
    classifier = ZeroShotClassifier(model, tokens)
    return classifier.encode_images(images), classifier.encode_classes()


def gradients(params, output):
    return torch.autograd.grad(output.square().sum(), list(params))


class PlainAttention(nn.Module):
    """Causal attention whose q, k and v are three linear maps."""

    def __init__(self, attn):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH).double() for _ in "qkv")
        self.out_proj = copy.deepcopy(attn.out_proj)
        rows = zip(attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3), strict=True)
        for linear, (weight, bias) in zip((self.q, self.k, self.v), rows, strict=True):
            linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, x, pool_idx):
        keys = torch.arange(x.shape[1])
        queries = keys.expand(len(x), -1) if pool_idx is None else pool_idx[:, None]  # (B, Q)
        q, k, v = self.q(x[torch.arange(len(x))[:, None], queries]), self.k(x), self.v(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        mask = keys <= queries[:, None, :, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("pool_idx", [None, torch.tensor([0, 3, 4])], ids=["all", "pooled"])
def test_output_and_gradients_equal_peft(pool_idx, dropout):
    peft = pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    model = nn.ModuleDict({"attn": Attention(WIDTH, HEADS, causal=True)}).double()
    nn.init.normal_(model.attn.in_proj_bias)
    plain = PlainAttention(model.attn)
    params = apply_trained_lora(model, ["attn"], rank=3, alpha=1.5, dropout=dropout)
    config = peft.LoraConfig(
        r=3, lora_alpha=1.5, use_rslora=True, lora_dropout=dropout, target_modules=["q", "k", "v"]
    )
    theirs = peft.inject_adapter_in_model(config, plain).train()
    their_params = []
    for part in "qkv":
        layer = theirs.get_submodule(part)
        for letter, linear in (("a", layer.lora_A.default), ("b", layer.lora_B.default)):
            linear.weight.data.copy_(params[f"attn.lora_{part}_{letter}"])
            their_params.append(linear.weight)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    set_dropout(model, True)
    torch.manual_seed(1)
    expected = theirs(x, pool_idx)
    torch.manual_seed(1)
    output = model.attn(x, pool_idx)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(params.values(), output), gradients(their_params, expected), **CLOSE
    )


@both_configs
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_initial_output_is_zero_shot(precision, config):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model, *inputs = tiny(dtype, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        before = features(model, *inputs)
        apply_lora(model, attentions(model))
        set_dropout(model, True)
        after = features(model, *inputs)
    # Bit for bit, but for products of other widths, which some versions of torch sum otherwise.
    rtol = 1e-12 if precision == "fp64" else 1e-5
    torch.testing.assert_close(after, before, rtol=rtol, atol=1e-6)


def test_initialization_follows_generator():
    models = [tiny(torch.float32)[0] for _ in range(3)]
    rng_state = torch.get_rng_state()
    first, second, other = (
        apply_lora(model, attentions(model), generator=torch.Generator().manual_seed(seed))
        for model, seed in zip(models, (1, 1, 2), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert {n for n, p in models[0].named_parameters() if p.requires_grad} == first.keys()
    assert len(first) == 6 * 6 and all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if name.endswith("_a")]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    scaled = torch.cat([(first[name] * first[name].shape[1] ** 0.5).flatten() for name in drawn])
    assert 0.95 < scaled.abs().max() <= 1 and abs(scaled.std() - 3**-0.5) < 0.03
    assert not any(first[name].any() for name in first if name.endswith("_b"))


def test_dropout_is_switched():
    model, *inputs = tiny()
    apply_trained_lora(model, attentions(model))

    def repeats():
        return all(map(torch.equal, features(model, *inputs), features(model, *inputs)))

    assert repeats()
    set_dropout(model, True)
    assert not repeats()
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {n + end for n in attentions(model) for end in ("", ".out_proj")}
    with merged_lora(model):
        assert repeats()
    set_dropout(model, False)
    assert repeats()


def test_checkpointed_text_repeats_dropout():
    model, _, tokens = tiny()
    params = apply_trained_lora(model, [n for n in attentions(model) if n.startswith("trans")])
    set_dropout(model, True)
    weights = torch.randn(4, 64, dtype=torch.float64)
    results = []
    for size in (0, 4):
        torch.manual_seed(1)
        output = ZeroShotClassifier(model, tokens, class_batch_size=size).encode_classes()
        results.append((output, *gradients(params.values(), output * weights)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@both_configs
def test_merged_output_and_restored_weights(config):
    model, *inputs = tiny(config=config)
    apply_trained_lora(model, attentions(model))
    before = copy.deepcopy(model.state_dict())
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = features(model, *inputs)
        with merged_lora(model) as merged:
            with merged_lora(model) as nested:
                assert not nested
            torch.testing.assert_close(features(model, *inputs), expected, **CLOSE)
        assert all(map(torch.equal, features(model, *inputs), expected))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    assert merged.keys() == {f"{name}.in_proj_weight" for name in attentions(model)}

    plain, *_ = tiny(config=config)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(features(plain, *inputs), expected, **CLOSE)


def test_merging_is_exact_under_autocast():
    model, *_ = tiny(torch.float32)
    apply_trained_lora(model, attentions(model)[:1])
    with merged_lora(model) as expected:
        pass
    with torch.autocast("cpu", torch.bfloat16), merged_lora(model) as merged:
        assert torch.equal(*merged.values(), *expected.values())
