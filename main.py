"""Adapt CLIP to an image classification task from a few images per class: SO, LoRA or Adam.

python main.py                                                    # the embedded default
python main.py --root_path $DATA --dataset eurosat --shots 16     # the main job
python main.py --help
"""

import sys
from collections.abc import Sequence
from dataclasses import fields

import clip
from checkpoint import Base, Checkpoint
from datasets import build_dataset
from datasets.loader import Loader
from optimizers.delta import save_delta, weights_digest
from optimizers.lora import merged
from optimizers.methods import make_method, select_matrices
from results import (
    describe,
    find_weights,
    finished,
    load_weights,
    locked,
    print_accuracy,
    run_folder,
    tell_finished,
    whats_next,
    write_config,
    write_curve,
    write_result,
)
from run_utils import Config, exit_status, parse_args, prepare_machine
from train import (
    Adapted,
    Course,
    NonFiniteLoss,
    Settings,
    compile_blocks,
    evaluate,
    tokenize_prompts,
    train,
)
from utils import Interrupted, Signals


def main(argv: Sequence[str] | None = None) -> None:
    """Measure zero-shot accuracy, adapt, measure again, and leave a folder of results."""
    config = parse_args(argv)
    with Signals() as signals:
        run(config, signals)


def run(config: Config, signals: Signals) -> None:
    """Do what the configuration says."""
    folder, course = run_folder(config), Course(config.n_iters * config.shots)
    saved = find_weights(folder, config) if config.eval_only else None
    device = prepare_machine(config.device, config.threads, config.seed)
    dataset = build_dataset(config.dataset, config.root_path, config.shots)
    if result := finished(folder, config, dataset.data):
        return tell_finished(result, folder, config)
    options = {"activation": config.activation, "heads": config.heads}
    model, _ = clip.load(config.backbone, device, **options)
    base = Base(config.backbone, options, weights_digest(model))
    matrices = select_matrices(model, config.encoder, config.position)
    prompts = tokenize_prompts(model, dataset.classnames, dataset.template)
    loader = Loader(model.visual.input_resolution, config.num_workers, config.cache_mb)

    def accuracy(split: str, title: str) -> float:
        items = dataset.val if split == "val" else dataset.test
        batches = loader.test_batches(items, batch_size=256)
        with signals.at_once(), merged(model):
            return evaluate(model, batches, len(items), prompts, config.precision, title)

    def tell(kind: str, value: float) -> None:
        print_accuracy(kind, value, config.eval_split)

    if saved or not course.iterations:
        tell("zero_shot_accuracy", accuracy(config.eval_split, "Zero-shot"))
        if saved:
            load_weights(model, saved, config.backbone)
            tell("accuracy", accuracy(config.eval_split, "Evaluation"))
        return

    with locked(folder), signals.deferred():
        checkpoint = Checkpoint(folder, config, dataset.data, base)
        interrupted = checkpoint.read()
        write_config(folder, config)
        method = make_method(
            config.method, model, matrices, lr=config.lr, density=1 - config.s, T=config.t,
            rank=config.rank, seed=config.seed, sampled=not (config.dense_grad or config.compile),
            grad_support=config.grad_support, moment_support=config.moment_support,
        )  # fmt: skip
        adapted = Adapted(model, prompts, method.optimizer, method.trained, method.matrices)
        if config.compile:
            compile_blocks(model)
        describe(config, dataset, method.summary, device)
        if interrupted:
            checkpoint.resume(interrupted, adapted, course)
            print(f"Going on from iteration {course.count} of at most {course.iterations}")
        else:
            course.zero_shot = accuracy(config.eval_split, "Zero-shot")
        tell("zero_shot_accuracy", course.zero_shot)

        def measure() -> float:
            if config.select == "val":
                course.offer(accuracy("val", "Validation"), adapted.trained, base.read)
            return accuracy(config.eval_split, "Evaluation")

        batches = loader.train_batches(
            dataset.train_x, config.batch_size, config.seed, config.crop_scale, config.crop_ratio,
            config.flip, start=course.count,
        )  # fmt: skip
        settings = Settings(**{f.name: getattr(config, f.name) for f in fields(Settings)})
        try:
            curve = train(
                adapted, batches, course, settings, measure=measure,
                save=lambda: checkpoint.save(adapted, course), interruption=signals.check,
            )  # fmt: skip
        except NonFiniteLoss as error:
            write_curve(folder, error.rows)
            raise
        except Interrupted as stop:
            stop.kept = checkpoint.kept
            raise

        chosen = course.best[0] if config.select == "val" else course.count
        final = course.accuracies[chosen]
        tell("final_accuracy", final)
        write_curve(folder, curve)
        if config.save_weights:
            before = base.read()  # a copy would have cost memory all along
            if config.select == "val":
                course.restore_best(adapted.trained, before)
            weights = folder / f"{config.filename}.safetensors"
            with merged(model):
                save_delta(weights, adapted.matrices, before, base.digest, backbone=config.backbone)
        write_result(
            folder, config, dataset.data, device, zero_shot_accuracy=course.zero_shot,
            final_accuracy=final, last_accuracy=course.accuracies[course.count],
            selected_iteration=chosen, iterations=course.count,
            wall_seconds=round(course.seconds, 3),
        )  # fmt: skip
    whats_next(config, folder)


if __name__ == "__main__":
    sys.exit(exit_status(main))
