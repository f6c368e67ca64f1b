"""Run the loops of docs/loops.md: unbroken, and killed in the middle of a window and resumed.

    python tests/optimizers/loops_run.py FOLDER LOOP...

Each run is a process of its own, forked from this one, which imports libraries and computes
nothing. It works in FOLDER/LOOP/unbroken or FOLDER/LOOP/killed, writes all it says to log.txt
there, and leaves weights, optimizer state and whether gradients were sparse in final.pt.
FOLDER/LOOP/codes.json has the exit codes. FOLDER/LOOP-sampled is the same by sampled gradients.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

ROOT = Path(__file__).parents[2]
IMPORTS = {  # what each loop imports
    "Plain torch": "torch",
    "Hugging Face Trainer": "transformers.trainer",
    "Accelerate": "accelerate",
    "Lightning, automatic": "lightning.pytorch",
    "Lightning, manual": "lightning.pytorch",
}
STEPS, EVERY, T = 17, 7, 5  # the checkpoint is at the second step of a window
KILLED_AFTER = 10  # steps
BATCH = 8  # the Trainer's default


def code_of(loop: str) -> str:
    """Find the code below a loop's heading in docs/loops.md, and what comes before it."""
    text = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
    names = ["Lightning", loop] if loop.startswith("Lightning") else [loop]
    blocks = [text.split(f"# {name}\n")[1].split("```")[1] for name in names]
    return "".join(block.removeprefix("python") for block in blocks)


class Model(nn.Sequential):
    """Layers that give logits, or their loss where labels are given, as the Trainer wants it."""

    def forward(self, inputs, labels=None):
        logits = super().forward(inputs)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def train(folder: Path, loop: str, sampled: bool, seed: int, killed: bool) -> None:
    """Execute a loop in a folder."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Not ROOT: transformers would take our folder `datasets` for Hugging Face's package.
    sys.path.insert(0, str(ROOT / "optimizers"))
    from SampledGradients import sample_gradients
    from SparseOptimizer import SO

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"(lightning|transformers|accelerate)\b")
    warnings.filterwarnings("ignore", "'pin_memory' argument is set")  # the Trainer's doing

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * STEPS * BATCH, 12, generator=generator)
    labels = torch.randint(5, (len(inputs),), generator=generator)
    items = list(zip(inputs, labels, strict=True))
    if loop == "Hugging Face Trainer":
        items = [dict(inputs=x, labels=y) for x, y in items]
    epoch = 2 * EVERY * BATCH if loop.startswith("Lightning") else len(items)

    torch.manual_seed(seed)  # decides over weights and supports: both must come from the checkpoint
    model = Model(nn.Linear(12, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 5))
    optimizers, sparse = [], []

    def after_step(*_):
        sparse.append(model[0].weight.grad.is_sparse)
        if killed and len(sparse) == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    def make(params, **settings):
        optimizers.append(SO(params, **settings))
        if sampled:
            sample_gradients(model, optimizers[0])
        optimizers[0].register_step_post_hook(after_step)
        return optimizers[0]

    def batches(step):
        for start in (2 * step * BATCH, (2 * step + 1) * BATCH):
            yield default_collate(items[start : start + BATCH])

    names = dict(os=os, torch=torch, SO=make, model=model, criterion=nn.CrossEntropyLoss())
    names.update(dataset=items, loader=DataLoader(items[:epoch], BATCH), batches=batches)
    names.update(steps=STEPS, every=EVERY)
    names.update(settings=dict(lr=1e-2, weight_decay=0.01, density_ratio=0.05, T=T))
    exec(compile(code_of(loop), loop, "exec"), names)

    state = dict(weights=model.state_dict(), optimizer=optimizers[0].state_dict())
    torch.save({**state, "sparse": all(sparse)}, "final.pt")


def run(folder: Path, *arguments) -> int:
    """Call train in a new process and return its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=train, args=(folder, *arguments))
    process.start()
    process.join()
    return process.exitcode


def main(top: Path, loops: list[str]) -> None:
    import torch._dynamo  # noqa: F401  optimizers import it in their first step

    for loop in loops:
        importlib.import_module(IMPORTS[loop])
    for loop in loops:
        for sampled in (False, True):
            folder = top / (f"{loop}-sampled" if sampled else loop)
            codes = [
                run(folder / "unbroken", loop, sampled, 1, False),
                run(folder / "killed", loop, sampled, 1, True),
                run(folder / "killed", loop, sampled, 2, False),
            ]
            (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
