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

import results
from checkpoint import Checkpoint
from classifier import evaluate, tokenize_prompts
from datasets import build_dataset
from datasets.loader import Loader
from machine import prepare_machine
from metrics import Predictions
from optimizers.delta import Base, load_weights
from optimizers.lora import merged
from optimizers.methods import make_method, select_matrices
from processes import Processes, connect, meet
from run_utils import Config, exit_status, parse_args
from train import Adapted, Course, NonFiniteLoss, Settings, compile_blocks, own_images, train
from utils import Interrupted, Signals, plural


def main(argv: Sequence[str] | None = None) -> None:
    """Measure zero-shot accuracy, adapt, measure again, and leave a folder of results."""
    processes = meet()
    config = parse_args(argv)
    device = connect(processes, config.device)
    with Signals() as signals, processes.quiet():
        run(config, device, processes, signals)


def run(config: Config, device: str, processes: Processes, signals: Signals) -> None:
    """Load data and model, and do with them what the configuration says."""
    folder, course = results.run_folder(config), Course(config.n_iters * config.shots)
    weights, alpha = results.find_weights(folder, config) if config.eval_only else (None, 1)
    device = prepare_machine(device, config.threads, config.seed)
    own = config.pick("classnames", "template", "fewshot_list")
    dataset = build_dataset(config.dataset, config.root_path, config.shots, **own)
    told = {"eval_only": config.eval_only, **results.computed(config)}
    processes.check_same(data=dataset.data["digest"], **told)
    if result := processes.first(lambda: results.finished(folder, config, dataset.data)):
        if processes.writes:
            results.tell_finished(result, folder, config)
        return
    base = Base(config.backbone, config.activation, config.heads)
    model = base.load(device)
    processes.check_same(backbone=base.digest)
    prompts = tokenize_prompts(model, dataset.classnames, dataset.template)
    loader = Loader(model.visual.input_resolution, config.num_workers, config.cache_mb)

    def predict(split: str, title: str) -> Predictions:
        items = dataset.val if split == "val" else dataset.test
        mine = [items[number] for number in processes.own(len(items))]
        batches = loader.test_batches(mine, batch_size=256)
        with signals.at_once(), merged(model):
            how = config.pick("precision", "logit_scale")
            return evaluate(model, batches, len(items), prompts, title, processes=processes, **how)

    if weights or not course.iterations:
        before = predict(config.eval_split, "Zero-shot").accuracy
        results.tell("zero_shot_accuracy", before, config.eval_split)
        if weights:
            load_weights(model, weights, config.backbone, alpha)
            after = predict(config.eval_split, "Evaluation").accuracy
            results.tell("accuracy", after, config.eval_split)
        return

    if processes.size > (largest := min(config.batch_size, len(dataset.train_x))):
        raise ValueError(
            f"{processes.size} processes cannot share batches of {plural(largest, 'image')}: give "
            "torchrun a smaller --nproc_per_node, or main.py a larger --batch_size"
        )
    with results.locked(folder) if processes.writes else nullcontext(), signals.deferred():
        checkpoint = Checkpoint(folder, config, dataset.data, base.digest)
        interrupted = processes.first(checkpoint.read)
        if processes.writes:
            results.write_task(folder, config, dataset)
        method = make_method(
            config.method, model, select_matrices(model, config.encoder, config.position),
            density=1 - config.s, T=config.t, sampled=not (config.dense_grad or config.compile),
            **config.pick("lr", "rank", "seed", "grad_support", "moment_support", "moments"),
        )  # fmt: skip
        if config.compile:
            compile_blocks(model)
        adapted = Adapted(model, prompts, method, base)
        results.describe(config, dataset, method.summary, device)
        if interrupted:
            checkpoint.resume(interrupted, adapted, course)
            print(f"Going on from iteration {course.count} of at most {course.iterations}")
        else:
            course.zero_shot = predict(config.eval_split, "Zero-shot").accuracy
        results.tell("zero_shot_accuracy", course.zero_shot, config.eval_split)

        def measure() -> Predictions:
            score = None
            with adapted.scaled(config.wise):
                if config.select == "val":
                    score = predict("val", "Validation").accuracy
                found = predict(config.eval_split, "Evaluation")
            if score is not None:
                course.offer(score, adapted)
            return found

        def save() -> None:
            if processes.writes:
                checkpoint.save(adapted, course)

        batches = loader.train_batches(
            dataset.train_x, config.batch_size, config.seed, config.crop_scale, config.crop_ratio,
            config.flip, course.count, partial(own_images, config.accumulate, processes),
        )  # fmt: skip
        interruption = partial(processes.check, signals)
        settings = Settings(**config.pick(*Settings.__annotations__))
        try:
            train(adapted, batches, course, settings, measure, save, interruption, processes)
        except NonFiniteLoss:
            if processes.writes:
                results.write_curve(folder, course.curve())
            raise
        except Interrupted as stop:
            stop.kept = checkpoint.kept
            raise
        results.tell("final_accuracy", course.measured["final_accuracy"], config.eval_split)
        if processes.writes:
            results.write_curve(folder, course.curve())
            if config.save_weights:
                adapted.save(folder / f"{config.filename}.safetensors", course, config.wise)
            results.write_result(folder, config, dataset, device, course)
    results.whats_next(config, folder)


if __name__ == "__main__":
    sys.exit(exit_status(main))
