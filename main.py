"""Adapt CLIP to an image classification task from a few images per class: SO, LoRA or Adam.

python main.py                                                    # the embedded default
python main.py --root_path $DATA --dataset eurosat --shots 16     # the main job
python main.py --help
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import clip
from checkpoint import generator_states, read_checkpoint, set_generators, write_checkpoint
from datasets import build_dataset
from datasets.loader import Loader
from optimizers.delta import apply_delta, read_delta, save_delta, weights_digest
from optimizers.lora import merged
from optimizers.methods import make_method
from optimizers.snapshot import Snapshot
from results import (
    describe,
    finished,
    open_folder,
    print_results,
    run_folder,
    tidy,
    whats_next,
    write_curve,
    write_result,
)
from run_utils import exit_status, parse_args, prepare_machine
from train import (
    BestIterate,
    Course,
    NonFiniteLoss,
    compile_blocks,
    evaluate,
    select_matrices,
    tokenize_prompts,
    train,
)
from utils import Signals


def main(argv: Sequence[str] | None = None) -> None:
    """Measure zero-shot accuracy, adapt, measure again, and leave a folder of results."""
    config = parse_args(argv)
    folder = run_folder(config)
    if result := finished(folder, config):
        tidy(folder)
        print(f"This run is finished: {folder}")
        return print_results(result, split=config.eval_split)
    with Signals() as signals:
        run(config, folder, signals)


def run(config: Namespace, folder: Path, signals: Signals) -> None:
    """Do what the configuration says, in the folder of this run."""
    start = time.perf_counter()
    weights = folder / f"{config.filename}.safetensors"
    device = prepare_machine(config.device, config.threads, config.seed)
    dataset = build_dataset(config.dataset, config.root_path, config.shots)
    model, _ = clip.load(config.backbone, device, activation=config.activation, heads=config.heads)
    matrices = select_matrices(model, config.encoder, config.position)
    prompts = tokenize_prompts(model, dataset.classnames, dataset.template)
    loader = Loader(model.visual.input_resolution, config.num_workers, config.cache_mb)

    def accuracy(split: str, desc: str) -> float:
        items = dataset.val if split == "val" else dataset.test
        batches = loader.test_batches(items, batch_size=256)
        with signals.at_once():
            return evaluate(model, batches, len(items), prompts, config.precision, desc)

    def show(key: str, value: float) -> None:
        print_results({key: value}, key, split=config.eval_split)

    if config.eval_only:
        apply_delta(model, read_delta(weights))
        return show("final_accuracy", accuracy(config.eval_split, "Evaluation"))

    with open_folder(folder, config), signals.deferred():
        base = weights_digest(model)
        method = make_method(
            config.method, model, matrices, lr=config.lr, density=1 - config.s, T=config.t,
            rank=config.rank, seed=config.seed, sampled=not (config.dense_grad or config.compile),
            grad_support=config.grad_support, moment_support=config.moment_support,
        )  # fmt: skip
        if config.compile:
            compile_blocks(model)
        best, snapshot = BestIterate(method.optimizer), Snapshot(method.optimizer)
        course = Course(config.n_iters * config.shots)
        describe(config, dataset, method.summary, device)
        if saved := read_checkpoint(folder, config, base):
            with saved.usable():
                best.load(saved["best"], snapshot)
                snapshot.load(saved)
                course.load(saved["course"])
                set_generators(saved["generators"], device)
                start -= saved["seconds"]
                zero_shot = float(saved["zero_shot_accuracy"])
            print(f"Going on from iteration {course.count} of at most {course.iterations}")
        else:
            zero_shot = accuracy(config.eval_split, "Zero-shot")
        show("zero_shot_accuracy", zero_shot)

        def save(course: Course) -> None:
            write_checkpoint(
                folder, config, base_digest=base, course=course.state(), **snapshot.state(),
                best=best.state(snapshot), generators=generator_states(device),
                zero_shot_accuracy=zero_shot, seconds=time.perf_counter() - start,
            )  # fmt: skip

        def measure(iteration: int) -> float:
            with merged(model):
                if config.select == "val":
                    best.offer(iteration, accuracy("val", "Validation"))
                return accuracy(config.eval_split, "Evaluation")

        batches = loader.train_batches(
            dataset.train_x, config.batch_size, config.seed, config.crop_scale, config.crop_ratio,
            config.flip, start=course.count,
        )  # fmt: skip
        try:
            curve = train(
                model, method.optimizer, batches, prompts, course, logit_scale=config.logit_scale,
                early_stop_loss=config.early_stop_loss, precision=config.precision,
                text_chunk=config.text_chunk, accumulate=config.accumulate,
                eval_every=config.eval_every, measure=measure, save=save,
                checkpoint_every=config.checkpoint_every, interruption=signals.check,
            )  # fmt: skip
        except NonFiniteLoss as error:
            write_curve(folder, error.rows)
            raise
        chosen = best.restore() if config.select == "val" else len(curve)
        final = curve[chosen - 1][-1]
        show("final_accuracy", final)

        write_curve(folder, curve)
        if config.save_weights:
            before, _ = clip.load(config.backbone, "cpu")  # a copy would cost memory all along
            if weights_digest(before) != base:
                raise ValueError(
                    f"{config.backbone} changed during this run: restore it, and --resume"
                )
            name = os.fsencode(config.backbone).decode("utf-8", "replace")  # in any locale
            with merged(model):
                save_delta(weights, method.matrices, before.state_dict(), base, backbone=name)
        write_result(
            folder, config, device, zero_shot_accuracy=zero_shot, final_accuracy=final,
            last_accuracy=curve[-1][-1], selected_iteration=chosen, iterations=len(curve),
            wall_seconds=round(time.perf_counter() - start, 3),
        )  # fmt: skip
        whats_next(config, folder)


if __name__ == "__main__":
    sys.exit(exit_status(main))
