"""How long an iteration takes at least: its matrix products, and the rate at which they can go."""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import synchronise
from clip import CLIP


def floor_flops(model: CLIP, batch: int, prompts: Tensor) -> int:
    """Operations of an iteration's matrix products: forward, and gradients of what enters them.

    What `train.train` leaves out is left out: text behind the longest prompt, all but the token
    that is read in the last blocks, text below the first trained block, gradients of what nothing
    trained lies below. Causal attention is counted whole.

    Args:
        model: What is trained in it requires gradients.
        batch: Images.
        prompts: Tokens of the classes' prompts, (P, C, L).
    """
    texts, length = prompts[..., 0].numel(), prompts.shape[-1]
    width, features = model.text_projection.shape
    text, visual = model.transformer.resblocks, model.visual
    passes = 2 * _trains(text)  # of what lies above the text tower: forward and back, or none
    total = texts * (_tower_flops(text, length, again=False) + passes * 2 * width * features)
    if hasattr(visual, "transformer"):
        blocks = visual.transformer.resblocks
        patches = len(visual.positional_embedding) - 1
        back = _trains(blocks)
        head = (1 + back) * 2 * visual.proj.numel()
        each = 2 * patches * visual.conv1.weight.numel() + head
        total += batch * (each + _tower_flops(blocks, patches + 1))
    else:
        back = False
        side = visual.input_resolution
        images = torch.zeros(batch, 3, side, side, device=prompts.device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones are not all counted
                visual(images)
        total += counter.get_total_flops()
    return total + (1 + back + _trains(text)) * 2 * batch * prompts.shape[1] * features


def _tower_flops(blocks: nn.Sequential, length: int, again: bool = True) -> int:
    """Of a stack for one sequence; `again`: blocks below the first trained run each time."""
    trained = [_trains(block) for block in blocks]
    if not (again or any(trained)):
        return 0
    first = trained.index(True) if any(trained) else len(blocks)
    width = blocks[0].attn.out_proj.in_features
    total = 0
    for number in range(0 if again else first, len(blocks)):
        read = 1 if number == len(blocks) - 1 else length
        project = 2 * (read + 2 * length) * width**2  # q of what is read, k and v of all
        attend = 2 * 2 * read * length * width
        rest = 2 * read * 9 * width**2  # out_proj, c_fc, c_proj
        total += project + attend + rest
        if number >= first:
            total += 2 * attend + rest  # attention has two gradients for each product
        if number > first:
            total += project
    return total


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def product_rate(model: CLIP, batch: int, prompts: Tensor) -> float:
    """Operations a second of products as large as an MLP's of the image tower, both ways.

    A ResNet has none: then it is the text tower's.
    """
    tokens, width = prompts.numel(), model.text_projection.shape[0]
    if hasattr(model.visual, "transformer"):
        positions, width = model.visual.positional_embedding.shape
        tokens = batch * positions
    random = partial(torch.randn, device=prompts.device)
    weight, bias = random(4 * width, width), random(4 * width)
    x, dy = random(tokens, width), random(tokens, 4 * width)
    seconds = 0.0
    for product in (lambda: F.linear(x, weight, bias), lambda: dy.mm(weight)):
        product()  # warms up
        synchronise(prompts.device)
        start = time.perf_counter()
        product()
        synchronise(prompts.device)
        seconds += time.perf_counter() - start
    return 2 * 2 * tokens * weight.numel() / seconds
