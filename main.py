"""Adapt CLIP to an image classification task from a few images per class: SO, LoRA or Adam.

python main.py                                                    # the embedded default
python main.py --root_path $DATA --dataset eurosat --shots 16     # the main job
torchrun --standalone --nproc_per_node 4 -- main.py ...           # the same on four GPUs
python main.py --help
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

from job import Job
from optimizers.build import build_optimizer, mark_as_trainable
from run_utils import get_arguments
from runs import output_dir, transfer
from runs.checkpoint import CheckpointSaver
from runs.cli import run_cli
from runs.distributed import cleanup_distributed, init_distributed, init_store
from runs.signals import Preempted, SignalHandler
from runs.weights import load_weights
from train import Adapted, NonFiniteLoss, TrainConfig, TrainState, compile_blocks, own_images, train
from utils import Predictions, plural


def main(argv: Sequence[str] | None = None) -> None:
    """Measure zero-shot accuracy, adapt, measure again, and leave a folder of results."""
    processes = init_store()
    config = get_arguments(argv)
    device = init_distributed(processes, config.device)
    with SignalHandler() as signals, processes.quiet():
        job = Job(config, device, processes, signals)
        if job.result:
            tell_again(job)
        elif job.kept or not config.n_iters:
            test(job)
        else:
            adapt(job)
    cleanup_distributed(processes)


def tell_again(job: Job) -> None:
    """Print what a finished run reached; test its weights on what --test_on names besides."""
    folder, first = job.folder, job.processes.first
    if job.processes.writes:
        output_dir.print_finished_run(job.result, folder, job.config)
    left = first(lambda: transfer.print_known_targets(folder, job.targets))
    if not left:
        return
    weights = first(lambda: output_dir.find_saved_weights(folder, job.config))
    job.load()
    tasks = {name: job.targets[name] for name in left}
    before = job.measure(tasks, "zero_shot_accuracy")
    load_weights(job.model, weights, job.config.backbone)
    after = job.measure(tasks, "final_accuracy")
    if job.processes.writes:
        transfer.save_transfer(folder, job.targets, before, after)


def test(job: Job) -> None:
    """Measure without training: zero-shot, and with --eval_only weights that were kept."""
    job.load()
    before = job.measure(job.tasks, "zero_shot_accuracy")
    if job.kept:
        weights, alpha = job.kept
        load_weights(job.model, weights, job.config.backbone, alpha)
        after = job.measure(job.tasks, "accuracy")
        if job.targets and job.processes.writes and weights.parent == job.folder:
            transfer.save_transfer(job.folder, job.targets, before, after)


def adapt(job: Job) -> None:
    """Train, measure, and leave a result."""
    config, processes, dataset, folder = job.config, job.processes, job.dataset, job.folder
    largest = min(config.batch_size, len(dataset.train_x))
    if processes.size > largest:
        raise ValueError(
            f"{processes.size} processes cannot share batches of {plural(largest, 'image')}: give "
            "torchrun a smaller --nproc_per_node, or main.py a larger --batch_size"
        )
    job.load()
    model, course = job.model, TrainState(config.n_iters * config.shots)
    with (
        output_dir.lock_output_dir(folder) if processes.writes else nullcontext(),
        job.signals.deferred(),
    ):
        checkpoint = CheckpointSaver(folder, config, dataset.fingerprint, job.base.sha256)
        interrupted = processes.first(checkpoint.read)
        if processes.writes:
            output_dir.save_run_inputs(folder, config, dataset)
        method = build_optimizer(
            config.method, model, mark_as_trainable(model, config.encoder, config.position),
            density=1 - config.s, T=config.t, sampled=not (config.dense_grad or config.compile),
            **config.pick("lr", "rank", "seed", "grad_support", "moment_support", "moments"),
        )  # fmt: skip
        if config.compile:
            compile_blocks(model)
        adapted = Adapted(model, job.prompts, method, job.base)
        output_dir.print_run_summary(config, dataset, method.summary, job.device, processes.size)
        if interrupted:
            checkpoint.resume(interrupted, adapted, course)
            print(f"Going on from iteration {course.count} of at most {course.iterations}")
        else:
            course.zero_shot = job.predict(config.eval_split, "Zero-shot").accuracy
            if dataset.new_classes:
                new = job.predict(config.eval_split, "Zero-shot", dataset.new_classes).accuracy
                course.new["zero_shot_new_accuracy"] = new
        before = {"zero_shot_accuracy": course.zero_shot, **course.new}
        output_dir.print_accuracies(output_dir.ZERO_SHOT_KEYS, before, config.eval_split)

        def save() -> None:
            if processes.writes:
                checkpoint.save(adapted, course)

        batches = job.loader.train_batches(
            dataset.train_x, config.batch_size, config.seed, config.crop_scale, config.crop_ratio,
            config.flip, course.count, partial(own_images, config.grad_accum_steps, processes),
        )  # fmt: skip
        settings = TrainConfig(**config.pick(*TrainConfig.__annotations__))
        measure = partial(measure_now, job, adapted, course)
        interruption = partial(processes.check, job.signals)
        try:
            train(adapted, batches, course, settings, measure, save, interruption, processes)
        except NonFiniteLoss:
            if processes.writes:
                output_dir.save_log(folder, course.curve())
            raise
        except Preempted as stop:
            stop.kept = checkpoint.kept
            raise
        output_dir.print_accuracies(output_dir.FINAL_KEYS, course.measured, config.eval_split)
        if processes.writes:
            output_dir.save_log(folder, course.curve())
            if config.save_weights:
                adapted.save(output_dir.weights_path(folder, config), course, config.wise)
            output_dir.save_result(folder, config, dataset, job.device, course, processes.size)
        if job.targets:
            base = adapted.report(course)
            with adapted.scaled(config.wise):
                after = job.measure(job.targets, "final_accuracy")
            adapted.restore(base)
            before = job.measure(job.targets, "zero_shot_accuracy")
            if processes.writes:
                transfer.save_transfer(folder, job.targets, before, after)
    output_dir.print_output_dir(config, folder)


def measure_now(job: Job, adapted: Adapted, course: TrainState) -> Predictions:
    """Measure the present weights as they would be reported."""
    config, score, new = job.config, None, job.dataset.new_classes
    with adapted.scaled(config.wise):
        if config.final_model == "best_val":
            score = job.predict("val", "Validation").accuracy
        found = job.predict(config.eval_split, "Evaluation")
        best = score is None or score > course.best[1]
        if new and best and (course.ended or score is not None):
            new_accuracy = job.predict(config.eval_split, "New classes", new).accuracy
            course.new["new_accuracy"] = new_accuracy
    if score is not None:
        course.offer(score, adapted)
    return found


if __name__ == "__main__":
    sys.exit(run_cli(main))
