"""Adapt CLIP to an image classification task from a few images per class: SO, LoRA or Adam.

python main.py                                                    # the demo: configs/digits.yaml
python main.py --root_path $DATA --dataset eurosat --shots 16     # the main job
torchrun --standalone --nproc_per_node 4 -- main.py ...           # the same on four GPUs
python main.py --help
"""

import argparse
import importlib.util
import math
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parent
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    if str(REPO_ROOT) not in sys.path:  # PYTHONSAFEPATH=1
        sys.path.insert(0, str(REPO_ROOT))
for name in ("clip", "datasets", "optimizers", "run_utils", "runs", "train", "utils"):
    spec = importlib.util.find_spec(name)
    if spec is None or REPO_ROOT not in Path(spec.origin or "").resolve().parents:
        raise ImportError(
            f"main.py needs its own module {name!r}, and Python finds {spec and spec.origin}: "
            f"call sys.path.insert(0, {str(REPO_ROOT)!r}) before any import"
        )

import torch
from torch import Tensor

from clip import CLIP
from clip.zero_shot import ZeroShotClassifier, tokenize_class_prompts
from datasets import FewShotDataset, build_dataset
from datasets.loader import ImageLoader
from optimizers.build import (
    ABLATION_DEFAULTS,
    build_optimizer,
    describe_optimizer,
    mark_as_trainable,
    trainable_parameters,
)
from optimizers.delta import apply_state_diff, diff_state_dict, save_delta
from run_utils import get_arguments, select_args
from runs import cli, distributed
from runs.checkpoint import CheckpointSaver
from runs.environment import describe_machine, get_default_device, set_random_seed, set_up_device
from runs.identity import get_identity
from runs.output_dir import (
    eval_items,
    find_eval_weights,
    get_output_dir,
    load_finished_result,
    lock_output_dir,
    remove_stale_files,
    save_curve,
    save_result,
    save_run_inputs,
    weights_path,
)
from runs.signals import Preempted, SignalHandler
from runs.transfer import build_transfer_datasets, print_known_targets, save_transfer
from runs.weights import PretrainedModel, evaluation_weights, find_weights, load_weights
from train import BestCheckpoint, TrainConfig, TrainState, evaluate, train
from utils import Predictions, format_error


@dataclass(frozen=True)
class Task:
    """A dataset to evaluate on."""

    dataset: FewShotDataset
    split: str  # "test" or "val"

    @property
    def has_uneven_classes(self) -> bool:
        """Whether the classes differ in their numbers of images: balanced accuracy is printed."""
        counts = Counter(item.label for item in eval_items(self.dataset, self.split))
        return len(set(counts.values())) > 1


def main(argv: Sequence[str] = ()) -> None:
    """Parse arguments, set up processes and device, run."""
    distributed.init_store()
    args = get_arguments(argv)
    device = distributed.init_distributed(args.device or get_default_device())
    with SignalHandler() as signals, distributed.print_on_main_only():
        run(args, set_up_device(device, args.threads), signals)
    distributed.cleanup_distributed()


def run(args: argparse.Namespace, device: torch.device, signals: SignalHandler) -> None:
    """Build the dataset and CLIP, then fine-tune, or only evaluate."""
    output_dir = get_output_dir(args)
    eval_weights = find_eval_weights(args) if args.eval_only else None
    set_random_seed(args.seed)
    dataset = build_dataset(
        args.dataset, args.root_path, args.shots,
        **select_args(args, "classnames", "template", "fewshot_split", "subsample"),
    )  # fmt: skip
    targets = build_transfer_datasets(args)
    tasks = {"": Task(dataset, args.eval_split)}
    if dataset.new_classes:
        tasks["new classes"] = Task(dataset.new_classes, args.eval_split)
    tasks |= {name: Task(target, "test") for name, target in targets.items()}
    pretrained = PretrainedModel(args.backbone, args.activation, args.heads)
    model = pretrained.load(device)
    identity = get_identity(args, dataset, pretrained.model_sha256)
    distributed.check_same_on_all_ranks(
        eval_only=args.eval_only, **identity["config"] | identity["inputs"]
    )
    result = distributed.run_on_main(load_finished_result, output_dir, args, identity)
    if result:
        distributed.run_on_main(remove_stale_files, output_dir)
        print(f"This run is finished: {output_dir}")
        cli.print_accuracies(result, args.eval_split, tasks[""].has_uneven_classes)
        if args.save_weights and not any(output_dir.glob("*.safetensors")):
            print("note: it saved no weights; --overwrite runs it again", file=sys.stderr)
        missing = distributed.run_on_main(print_known_targets, output_dir, targets)
        if not missing:
            return
        tasks = {name: tasks[name] for name in missing}
        eval_weights = distributed.run_on_main(find_weights, output_dir), 1.0
    loader = ImageLoader(
        model.visual.input_resolution, args.num_workers, args.cache_mb, model.image_resize
    )
    evaluator = Evaluator(args, model, pretrained, loader, signals, tasks)
    if result or eval_weights or not args.n_iters:
        kind = "final_accuracy" if result else "accuracy"
        saves = evaluator.targets and eval_weights and eval_weights[0].parent == output_dir
        with lock_output_dir(output_dir) if saves else nullcontext():
            evaluate_only(evaluator, eval_weights, kind)
    else:
        finetune(evaluator, identity)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates the model of a run."""

    args: argparse.Namespace
    model: CLIP
    pretrained: PretrainedModel
    loader: ImageLoader
    signals: SignalHandler
    tasks: Mapping[str, Task]  # of the run, "" and perhaps "new classes"; of --test_on, by name

    @property
    def targets(self) -> dict[str, FewShotDataset]:
        """The datasets of --test_on."""
        run_tasks = ("", "new classes")
        return {name: task.dataset for name, task in self.tasks.items() if name not in run_tasks}

    def build_classifier(self, dataset: FewShotDataset) -> ZeroShotClassifier:
        """The model as a classifier of a dataset's classes."""
        text_tokens = tokenize_class_prompts(self.model, dataset.classnames, dataset.template)
        settings = select_args(self.args, "logit_scale", "precision", "class_batch_size")
        return ZeroShotClassifier(self.model, text_tokens, **settings)

    def predict(self, task: Task, desc: str = "Evaluation") -> Predictions:
        """Classify the images of a task, each process its slice; signals may interrupt that."""
        items = eval_items(task.dataset, task.split)
        local_items = items[distributed.local_slice(len(items))]
        with self.signals.defer(False):
            classifier = self.build_classifier(task.dataset)
            local = evaluate(classifier, self.loader, local_items, desc)
        return Predictions(*(distributed.all_gather_rows(part, len(items)) for part in local))

    def predict_all(self, tasks: Mapping[str, Task]) -> dict[str, Predictions]:
        """Classify the images of each task, by name."""
        return {name: self.predict(task, name or "Evaluation") for name, task in tasks.items()}


def evaluate_only(evaluator: Evaluator, eval_weights: tuple[Path, float] | None, kind: str) -> None:
    """Print zero-shot accuracies, then those of saved weights.

    `eval_weights` is a file, if any, and the factor of its difference to the pretrained weights;
    `kind` is the accuracies' key in runs.cli.ACCURACY_LINES.
    """
    tasks = evaluator.tasks
    zero_shot = evaluator.predict_all(tasks)
    print_by_task("zero_shot_accuracy", zero_shot, tasks)
    if eval_weights is None:
        return
    path, alpha = eval_weights
    load_weights(evaluator.model, path, alpha)
    final = evaluator.predict_all(tasks)
    print_by_task(kind, final, tasks)
    if path.parent == get_output_dir(evaluator.args):
        targets = evaluator.targets
        distributed.run_on_main(save_transfer, path.parent, targets, zero_shot, final)


def print_by_task(
    kind: str, predictions: Mapping[str, Predictions], tasks: Mapping[str, Task]
) -> None:
    """Print one accuracy of each task; of --eval_only also the balanced one of uneven classes."""
    for name, task in tasks.items():
        cli.print_accuracy(kind, predictions[name].accuracy, task.split, name)
        if kind == "accuracy" and not name and task.has_uneven_classes:
            cli.print_accuracy("balanced", predictions[name].balanced_accuracy, task.split)


def finetune(evaluator: Evaluator, identity: dict[str, Any]) -> None:
    """Train, evaluate, and save the result; `identity` is `runs.identity.get_identity`'s."""
    args, model, pretrained = evaluator.args, evaluator.model, evaluator.pretrained
    signals, task = evaluator.signals, evaluator.tasks[""]
    output_dir, dataset = get_output_dir(args), task.dataset
    is_distributed = distributed.get_world_size() > 1
    weights = mark_as_trainable(model, args.encoder, args.position, args.method)
    pretrained.copy_weights(weights)
    optimizer = build_optimizer(
        args.method, model, weights, density=1 - args.s, T=args.t,
        sparse_grad=not args.dense_grad, ablation=select_args(args, *ABLATION_DEFAULTS),
        **select_args(args, "lr", "rank", "seed"),
    )  # fmt: skip
    trained = trainable_parameters(model)
    classifier = evaluator.build_classifier(dataset)
    state = TrainState(args.n_iters * args.shots, classifier.device, args.precision)
    config = TrainConfig(**select_args(args, "lr", "early_stop_loss", "grad_accum_steps", "seed"))
    saver = CheckpointSaver(output_dir / "checkpoint.pt", args, identity, pretrained)

    with lock_output_dir(output_dir), signals.defer():
        checkpoint = distributed.run_on_main(saver.load)
        distributed.run_on_main(save_run_inputs, output_dir, args, dataset)
        description = describe_optimizer(args.method, weights, optimizer)
        cli.print_run_summary(args, dataset, description, classifier.device)
        if checkpoint:
            apply_state_diff(checkpoint["trained"], trained, model.state_dict())
            optimizer.load_state_dict(checkpoint["optimizer"])
            state.load_state_dict(checkpoint["state"])
            print(f"Resuming from iteration {state.iteration} of at most {state.total_iters}")
        else:
            if args.resume:
                print(f"note: there is no usable checkpoint in {output_dir}: starting anew")
            state.zero_shot["zero_shot_accuracy"] = evaluator.predict(task).accuracy
            if new_classes := evaluator.tasks.get("new classes"):
                accuracy = evaluator.predict(new_classes).accuracy
                state.zero_shot["zero_shot_new_accuracy"] = accuracy
        cli.print_accuracies(state.zero_shot, args.eval_split)
        batches = evaluator.loader.train_batches(
            dataset.train_x, args.batch_size, args.seed, args.crop_scale, args.crop_ratio,
            args.flip, state.iteration, distributed.local_slice if is_distributed else slice,
        )  # fmt: skip
        eval_every, save_every = args.eval_every or math.inf, args.checkpoint_every or math.inf
        try:
            with closing(train(classifier, optimizer, batches, state, config)) as steps:
                for _ in steps:
                    if is_distributed:
                        distributed.share_signals(signals)
                    if signals.pending:
                        raise Preempted(signals.pending)
                    is_due = state.done or state.iteration % eval_every == 0
                    if is_due and state.iteration not in state.accuracies:
                        evaluate_step(evaluator, state, weights)
                    if state.iteration % save_every == 0:
                        saver.save(trained, optimizer, state)
        except BaseException as error:
            if state.can_checkpoint():
                saver.save(trained, optimizer, state)
            error.checkpoint_note = saver.note
            raise

        saver.save(trained, optimizer, state)  # for the case that the results cannot be written
        if state.best:
            apply_state_diff(state.best.diff, trained, pretrained.weights)
        try:
            distributed.run_on_main(save_outputs, evaluator, state, weights, identity)
        except OSError as error:
            raise ValueError(f"{format_error(error)}: make room, then --resume") from error
        distributed.run_on_main(saver.path.unlink, True)
        cli.print_accuracies(state.final_accuracies(), args.eval_split, task.has_uneven_classes)
        if targets := evaluator.targets:
            tasks = {name: evaluator.tasks[name] for name in targets}
            with evaluation_weights(model, weights, pretrained, args.wise):
                final = evaluator.predict_all(tasks)
            with evaluation_weights(model, weights, pretrained, alpha=0):
                zero_shot = evaluator.predict_all(tasks)
            distributed.run_on_main(save_transfer, output_dir, targets, zero_shot, final)
            print_by_task("zero_shot_accuracy", zero_shot, tasks)
            print_by_task("final_accuracy", final, tasks)
    print(f"\nResults: {output_dir}")


def evaluate_step(evaluator: Evaluator, state: TrainState, weights: Mapping[str, Tensor]) -> None:
    """Evaluate the present weights, as they would be reported, and record the accuracies."""
    args, pretrained, tasks = evaluator.args, evaluator.pretrained, evaluator.tasks
    score = None
    with evaluation_weights(evaluator.model, weights, pretrained, args.wise):
        if args.final_model == "best_val":
            score = evaluator.predict(Task(tasks[""].dataset, "val"), "Validation").accuracy
        predictions = evaluator.predict(tasks[""])
        is_best = score is not None and (state.best is None or score > state.best.score)
        if "new classes" in tasks and (is_best or (state.done and score is None)):
            new_accuracy = evaluator.predict(tasks["new classes"], "New classes").accuracy
            state.new_accuracies[state.iteration] = new_accuracy
    if is_best:
        diff = diff_state_dict(trainable_parameters(evaluator.model), pretrained.weights)
        state.best = BestCheckpoint(state.iteration, score, diff)
    state.record_eval(predictions)


def save_outputs(
    evaluator: Evaluator,
    state: TrainState,
    weights: Mapping[str, Tensor],
    identity: dict[str, Any],
) -> None:
    """Write the log, the weights to report, the predictions and, last, the result."""
    args, pretrained = evaluator.args, evaluator.pretrained
    output_dir = get_output_dir(args)
    save_curve(output_dir, state.curve_rows(args.lr))
    if args.save_weights:
        metadata = {"backbone": pretrained.name}
        if args.wise != 1:
            metadata["wise"] = f"{args.wise:g}"
        with evaluation_weights(evaluator.model, weights, pretrained, args.wise):
            path = weights_path(output_dir, args)
            save_delta(path, weights, pretrained.weights, pretrained.sha256, **metadata)
    summary = {**state.summary(), **describe_machine(state.device), **identity}
    dataset = evaluator.tasks[""].dataset
    save_result(output_dir, args, dataset, state.predictions, summary)


if __name__ == "__main__":
    sys.exit(cli.run_cli(lambda: main(sys.argv[1:])))
