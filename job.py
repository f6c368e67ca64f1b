"""What a run works with: its data, its model, and the accuracies that they have."""

from collections.abc import Mapping

from clip.lora import merged
from clip.zero_shot import evaluate, tokenize_prompts
from datasets import FewShotDataset, build_dataset
from datasets.loader import Loader
from optimizers.delta import Base
from run_utils import Config
from runs import output_dir, transfer
from runs.distributed import Processes
from runs.environment import prepare_machine
from runs.signals import Signals
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

    def __init__(self, config: Config, device: str, processes: Processes, signals: Signals) -> None:
        self.config, self.processes, self.signals = config, processes, signals
        self.folder = output_dir.run_folder(config)
        # Found, or missed, before the time that data takes.
        self.kept = output_dir.find_weights(self.folder, config) if config.eval_only else None
        self.device = prepare_machine(device, config.threads, config.seed)
        own = config.pick("classnames", "template", "fewshot_list", "subsample")
        self.dataset = build_dataset(config.dataset, config.root_path, config.shots, **own)
        self.targets = transfer.build_targets(config)
        new = {"new classes": self.dataset.new} if self.dataset.new else {}
        self.tasks = {"": self.dataset, **new, **self.targets}
        told = {"eval_only": config.eval_only, **output_dir.computed(config)}
        data = [task.data["digest"] for task in self.tasks.values()]
        processes.check_same(data=data, **told)
        self.result = processes.first(
            lambda: output_dir.finished(self.folder, config, self.dataset.data)
        )

    def load(self) -> None:
        """Load the model, and what goes through it."""
        config = self.config
        self.base = Base(config.backbone, config.activation, config.heads)
        self.model = self.base.load(self.device)
        self.processes.check_same(backbone=self.base.digest)
        self.prompts = tokenize_prompts(self.model, self.dataset.classnames, self.dataset.template)
        resolution = self.model.visual.input_resolution
        self.loader = Loader(resolution, config.num_workers, config.cache_mb)

    def predict(self, split: str, title: str, task: FewShotDataset | None = None) -> Predictions:
        """Classify the images of a task's split, shared out to the processes.

        Args:
            split: "test" or "val".
            title: What the progress bar says.
            task: The run's own task if None.
        """
        task, prompts = task or self.dataset, self.prompts
        if task is not self.dataset:
            prompts = tokenize_prompts(self.model, task.classnames, task.template)
        items = output_dir.images_of(task, split)
        mine = [items[number] for number in self.processes.own(len(items))]
        batches = self.loader.test_batches(mine, batch_size=256)
        how = self.config.pick("precision", "logit_scale")
        with self.signals.at_once(), merged(self.model):
            return evaluate(
                self.model, batches, len(items), prompts, title, processes=self.processes, **how
            )

    def measure(self, tasks: Mapping[str, FewShotDataset], kind: str) -> dict[str, float]:
        """Accuracies on tasks, in percent, by name; printed as this kind (`output_dir.tell`)."""
        found = {}
        for where, task in tasks.items():
            split = "test" if where in self.targets else self.config.eval_split
            found[where] = self.predict(split, where or "Evaluation", task).accuracy
            output_dir.tell(kind, found[where], split, where)
        return found
