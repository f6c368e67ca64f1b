"""Adapters: zero-shot at first, then the plain formula and peft's numbers; merged, taken out."""

import copy
import math
from collections import Counter
from itertools import repeat

import pytest
import torch
from clip_helpers import TINY_RESNET, TINY_VIT, random_state_dict
from torch import nn

from clip import build_model
from clip.lora import apply_lora, merged_lora, set_dropout
from clip.model import Attention
from clip.zero_shot import ZeroShotClassifier
from train import TrainConfig, TrainState, train

# torch 2.4's own, when it recomputes a chunk of the text
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")
CLOSE = dict(rtol=1e-10, atol=1e-10)
WIDTH = 64
HEADS = 4


def attentions(model):
    return [name for name, module in model.named_modules() if isinstance(module, Attention)]


def tiny(dtype=torch.float64, config=TINY_VIT):
    """A model, uint8 images and prompts' tokens for it."""
    model = build_model(random_state_dict(config)).to(dtype)
    side = config["image_resolution"]
    images = torch.randint(256, (3, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(1, 500, (1, 4, 9))
    for row, end in zip(tokens[0], (3, 8, 5, 6), strict=True):
        row[end] = 513
    return model, images, tokens


def move(params):
    """Give A and B values as training might have left them."""
    for p in params.values():
        p.data.normal_(std=0.2)


def features(model, images, tokens, chunk=0):
    classifier = ZeroShotClassifier(model, tokens, class_batch_size=chunk)
    return classifier.encode_images(images), classifier.encode_classes()


def gradients(params, output):
    return torch.autograd.grad(output.square().sum(), list(params))


class Separate(nn.Module):
    """Attention whose q, k and v are three linear maps, in plain operations."""

    def __init__(self, attn):
        super().__init__()
        for i, name in enumerate(("q", "k", "v")):
            linear = nn.Linear(WIDTH, WIDTH, dtype=attn.in_proj_weight.dtype)
            rows = slice(i * WIDTH, (i + 1) * WIDTH)
            linear.weight.data = attn.in_proj_weight[rows].detach().clone()
            linear.bias.data = attn.in_proj_bias[rows].detach().clone()
            setattr(self, name, linear)
        self.out_proj, self.causal = copy.deepcopy(attn.out_proj), attn.causal

    def forward(self, x, read=None):
        rows = torch.arange(len(x))
        queries = x if read is None else x[rows, read][:, None]
        q, k, v = self.q(queries), self.k(x), self.v(x)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        if self.causal:
            at = torch.arange(x.shape[1]).expand(len(x), -1) if read is None else read[:, None]
            unseen = torch.arange(x.shape[1]) > at[:, None, :, None]
            scores = scores.masked_fill(unseen, -math.inf)
        return self.out_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def adapted(causal=False, rank=3, alpha=1.5, dropout=0.0):
    """One attention layer with adapters that have moved, and the model that consists of it."""
    model = nn.ModuleDict({"attn": Attention(WIDTH, HEADS, causal)}).double()
    nn.init.normal_(model.attn.in_proj_bias)
    plain = Separate(model.attn)
    params = apply_lora(model, ["attn"], rank, alpha, dropout)
    move(params)
    return model, plain, params


# What is computed


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_first_pass_is_zero_shots(precision, config):
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model, *inputs = tiny(dtype, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        before = features(model, *inputs)
        apply_lora(model, attentions(model))
        set_dropout(model, True)
        after = features(model, *inputs)
    # Bit for bit, but for products of other widths, which some versions of torch sum otherwise.
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(
            other, one, rtol=1e-12 if precision == "fp64" else 1e-5, atol=1e-6
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("read", [None, torch.tensor([0, 3, 4])], ids=["whole", "read"])
def test_output_is_the_plain_formula(causal, read):
    rank, alpha = 3, 1.5
    model, plain, params = adapted(causal, rank, alpha)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(model.attn(x, read), plain(x, read))
        for part in "qkv":
            a, b = params[f"attn.lora_{part}_a"], params[f"attn.lora_{part}_b"]
            plain.get_submodule(part).weight += alpha / math.sqrt(rank) * b @ a
        torch.testing.assert_close(model.attn(x, read), plain(x, read), **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("read", [None, torch.tensor([0, 3, 4])], ids=["whole", "read"])
def test_outputs_and_gradients_are_pefts(read, dropout):
    peft = pytest.importorskip("peft", reason="needs peft: pip install -r tests/requirements.txt")
    model, plain, params = adapted(causal=True, dropout=dropout)
    config = peft.LoraConfig(
        r=3, lora_alpha=1.5, use_rslora=True, lora_dropout=dropout, target_modules=["q", "k", "v"]
    )
    theirs = peft.inject_adapter_in_model(config, plain)
    twins = []
    for part in "qkv":
        layer = theirs.get_submodule(part)
        for kind, linear in (("a", layer.lora_A.default), ("b", layer.lora_B.default)):
            linear.weight.data.copy_(params[f"attn.lora_{part}_{kind}"])
            twins.append(linear.weight)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    theirs.train()
    set_dropout(model, True)
    torch.manual_seed(1)
    expected = theirs(x, read)
    torch.manual_seed(1)
    output = model.attn(x, read)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(params.values(), output), gradients(twins, expected), **CLOSE
    )


def test_a_starts_uniform_and_follows_the_generator():
    first, second, other = (tiny(torch.float32)[0] for _ in range(3))
    layers = attentions(first)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    state = torch.get_rng_state()
    a, b, c = (
        apply_lora(model, layers, generator=seed)
        for model, seed in zip((first, second, other), seeds, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(a) == 6 * 6 and all(torch.equal(a[name], b[name]) for name in a)
    drawn = [name for name in a if name.endswith("_a")]
    assert not any(torch.equal(a[name], c[name]) for name in drawn)
    scaled = torch.cat([(a[name] * a[name].shape[1] ** 0.5).flatten() for name in drawn])
    assert 0.95 < scaled.abs().max() <= 1
    assert abs(scaled.std() - 3**-0.5) < 0.03
    assert not any(a[name].any() for name in a if name.endswith("_b"))


# What is trained


def test_only_adapters_of_the_named_layers_train():
    model, images, tokens = tiny()
    layers = attentions(model)[1:4:2]
    params = apply_lora(model, layers, rank=1)
    named = dict(model.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == params.keys()
    assert all(named[name] is p for name, p in params.items())
    shapes = Counter((name.rpartition(".")[0], tuple(p.shape)) for name, p in params.items())
    widths = {name: model.get_submodule(name).in_proj_weight.shape[1] for name in layers}
    assert shapes == Counter(
        {(n, shape): 3 for n, width in widths.items() for shape in ((1, width), (width, 1))}
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_moves_adapters_alone_and_lowers_the_loss(device, precision):
    model, images, tokens = tiny(torch.float32)
    model, tokens = model.to(device), tokens.to(device)
    params = apply_lora(model, attentions(model))
    set_dropout(model, True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = images, torch.tensor([2, 0, 1])
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=1e-2)
    classifier = ZeroShotClassifier(
        model, tokens, logit_scale=10.0, precision=precision, class_batch_size=3
    )
    state = TrainState(20, torch.device(device), precision)
    for _ in train(classifier, optimizer, repeat((batch, True)), state, TrainConfig(1e-2)):
        pass
    losses = state.losses.tolist()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == params.keys()
    assert losses[-1] < losses[0] / 2
    with merged_lora(model):
        cosines = classifier.encode_images(images.to(device)) @ classifier.encode_classes().T
        assert cosines.argmax(dim=-1).tolist() == [2, 0, 1]


# Dropout


def test_dropout_is_active_only_while_switched_on():
    model, *inputs = tiny()
    move(apply_lora(model, attentions(model)))

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


def test_checkpointed_text_drops_the_same_inputs_again():
    model, _, tokens = tiny()
    layers = [name for name in attentions(model) if name.startswith("transformer")]
    params = apply_lora(model, layers)
    move(params)
    set_dropout(model, True)
    probe = torch.randn(4, 64, dtype=torch.float64)
    results = []
    for chunk in (0, 4):
        torch.manual_seed(1)
        output = ZeroShotClassifier(model, tokens, class_batch_size=chunk).encode_classes()
        results.append((output, *gradients(params.values(), output * probe)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# Merging


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["ViT", "ResNet"])
def test_merged_forward_is_the_adapters_and_unmerging_restores_bits(config):
    model, *inputs = tiny(config=config)
    params = apply_lora(model, attentions(model))
    move(params)
    before = copy.deepcopy(model.state_dict())
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = features(model, *inputs)
        with merged_lora(model) as matrices:
            torch.testing.assert_close(features(model, *inputs), expected, **CLOSE)
            with merged_lora(model) as again:
                torch.testing.assert_close(features(model, *inputs), expected, **CLOSE)
            assert not again
            torch.testing.assert_close(features(model, *inputs), expected, **CLOSE)
        assert all(map(torch.equal, features(model, *inputs), expected))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    assert matrices.keys() == {f"{name}.in_proj_weight" for name in attentions(model)}
    assert not any(torch.equal(matrices[name], after[name]) for name in matrices)

    ordinary, *_ = tiny(config=config)
    ordinary.load_state_dict(matrices, strict=False)
    torch.testing.assert_close(features(ordinary, *inputs), expected, **CLOSE)


def test_unmerged_after_an_error():
    model, _, _ = adapted()
    before = model.attn.in_proj_weight.clone()
    with pytest.raises(RuntimeError, match="within"), merged_lora(model):
        raise RuntimeError("within")
    assert torch.equal(model.attn.in_proj_weight, before) and not model.attn.lora_merged


def test_merging_is_exact_under_autocast():
    model, _, _ = adapted()
    model.float()
    with merged_lora(model) as expected:
        pass
    with torch.autocast("cpu", torch.bfloat16), merged_lora(model) as matrices:
        assert torch.equal(*matrices.values(), *expected.values())


def test_merging_leaves_a_model_without_adapters_alone():
    model, *inputs = tiny()
    before = features(model, *inputs)
    set_dropout(model, True)
    with merged_lora(model) as matrices:
        assert not matrices
        assert all(map(torch.equal, features(model, *inputs), before))


# Living with the rest


def test_copies_and_saved_adapters_compute_the_same():
    model, *inputs = tiny()
    params = apply_lora(model, attentions(model))
    move(params)
    expected = features(model, *inputs)
    assert all(map(torch.equal, features(copy.deepcopy(model), *inputs), expected))
    fresh, *_ = tiny()
    apply_lora(fresh, attentions(fresh))
    fresh.load_state_dict(model.state_dict())
    assert all(map(torch.equal, features(fresh, *inputs), expected))


# Refusals


@pytest.mark.parametrize(
    "name, value",
    [
        *(("rank", value) for value in (0, -1, 1.5, True)),
        *(("alpha", value) for value in (0, -1.0, math.nan, math.inf)),
        *(("dropout", value) for value in (-0.1, 1, 1.5, math.nan)),
    ],
)
def test_bad_settings_are_refused(name, value):
    model = nn.ModuleDict({"attn": Attention(WIDTH, HEADS)})
    with pytest.raises(ValueError, match=f"{name} must be .*, not {value!r}"):
        apply_lora(model, ["attn"], **{name: value})
    assert type(model.attn) is Attention and model.attn.in_proj_weight.requires_grad


@pytest.mark.parametrize(
    "layers, message",
    [([], "no attention layer"), (["attn.out_proj"], r"attn\.out_proj must be an Attention")],
)
def test_bad_layers_are_refused(layers, message):
    model = nn.ModuleDict({"attn": Attention(WIDTH, HEADS)})
    with pytest.raises(ValueError, match=message):
        apply_lora(model, layers)
    apply_lora(model, ["attn"])
    with pytest.raises(ValueError, match="attn must be an Attention without adapters"):
        apply_lora(model, ["attn"])
