"""What a run works with: its data, its model, and the accuracies that they have."""

from collections.abc import Mapping

from clip.lora import merged_lora
from clip.zero_shot import evaluate, tokenize_class_prompts
from datasets import FewShotDataset, build_dataset
from datasets.loader import ImageLoader
from run_utils import Config
from runs import output_dir, transfer
from runs.distributed import DistInfo
from runs.environment import set_up_device
from runs.signals import SignalHandler
from runs.weights import PretrainedModel
from utils import Predictions


class Job:
    """The parts of a run.

    Args:
        config: What it is told.
        device: Name of the device that this process computes on.
        processes: All of its processes.
        signals: What may interrupt it.

    Attributes:
        folder: The run's.
        kept: The weights that --eval_only evaluates, and the factor that scales them.
        dataset: The task.
        targets: What --test_on names, by name.
        tasks: All that is tested, by name: "" for the task itself, its new classes, the targets.
        result: What the folder holds of this very run, if that has ended before.
        model, base, prompts, loader: Made by `load`; tokens of the task's prompts are (P, C, L).
    """

    def __init__(
        self, config: Config, device: str, processes: DistInfo, signals: SignalHandler
    ) -> None:
        self.config, self.processes, self.signals = config, processes, signals
        self.folder = output_dir.get_output_dir(config)
        # Found, or missed, before the time that data takes.
        self.kept = output_dir.find_eval_weights(self.folder, config) if config.eval_only else None
        self.device = set_up_device(device, config.threads, config.seed)
        own = config.pick("classnames", "template", "fewshot_split", "subsample")
        self.dataset = build_dataset(config.dataset, config.root_path, config.shots, **own)
        self.targets = transfer.build_target_datasets(config)
        new = {"new classes": self.dataset.new_classes} if self.dataset.new_classes else {}
        self.tasks = {"": self.dataset, **new, **self.targets}
        told = {"eval_only": config.eval_only, **output_dir.get_hparams(config)}
        data = [task.fingerprint["digest"] for task in self.tasks.values()]
        processes.check_same(data=data, **told)
        self.result = processes.first(
            lambda: output_dir.load_finished_result(self.folder, config, self.dataset.fingerprint)
        )

    def load(self) -> None:
        """Load the model, and what goes through it."""
        config = self.config
        self.base = PretrainedModel(config.backbone, config.activation, config.heads)
        self.model = self.base.load(self.device)
        self.processes.check_same(backbone=self.base.sha256)
        self.prompts = tokenize_class_prompts(
            self.model, self.dataset.classnames, self.dataset.template
        )
        resolution = self.model.visual.input_resolution
        self.loader = ImageLoader(resolution, config.num_workers, config.cache_mb)

    def predict(self, split: str, title: str, task: FewShotDataset | None = None) -> Predictions:
        """Classify the images of a task's split, shared out to the processes.

        Args:
            split: "test" or "val".
            title: What the progress bar says.
            task: The run's own task if None.
        """
        task, prompts = task or self.dataset, self.prompts
        if task is not self.dataset:
            prompts = tokenize_class_prompts(self.model, task.classnames, task.template)
        items = output_dir.get_split(task, split)
        mine = [items[number] for number in self.processes.own(len(items))]
        batches = self.loader.test_batches(mine, batch_size=256)
        how = self.config.pick("precision", "logit_scale")
        with self.signals.at_once(), merged_lora(self.model):
            return evaluate(
                self.model, batches, len(items), prompts, title, processes=self.processes, **how
            )

    def measure(self, tasks: Mapping[str, FewShotDataset], kind: str) -> dict[str, float]:
        """Accuracies on tasks, in percent, by name; printed as this kind (`output_dir.print_accuracy`)."""  # noqa: E501
        found = {}
        for where, task in tasks.items():
            split = "test" if where in self.targets else self.config.eval_split
            found[where] = self.predict(split, where or "Evaluation", task).accuracy
            output_dir.print_accuracy(kind, found[where], split, where)
        return found
