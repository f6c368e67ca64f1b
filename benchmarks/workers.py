"""Processes that are measured side by side: each does one row's work, and they take turns."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, float]  # seconds of an iteration and its parts, and the number of the step


class Worker:
    """A process that runs one row and answers questions; `error` says why it no longer does."""

    def __init__(self, command: Sequence[str]) -> None:
        self.error = ""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str) -> Any:
        """The answer, or None where there is none any more."""
        if self.error:
            return None
        try:
            print(question, file=self.process.stdin, flush=True)
            reply = json.loads(self.process.stdout.readline() or "{}")
        except BrokenPipeError:
            reply = {}
        if "answer" not in reply:
            self.end()
            self.error = reply.get("error", f"ended with status {self.process.returncode}")
        return reply.get("answer")

    def end(self) -> None:
        """Let the process end."""
        self.process.communicate()


def take_turns(
    workers: Mapping[str, Worker], repeats: int, reference: Worker | None
) -> tuple[dict[str, list[Record]], list[float]]:
    """Let rows run in turn, at least `repeats` iterations each, after a turn that warms up.

    Returns:
        Records by row; and the rate of matrix products beside the reference, once a round.
    """
    records: dict[str, list[Record]] = {name: [] for name in workers}
    rates = []
    for worker in workers.values():
        worker.ask("turn")
    while any(len(records[name]) < repeats and not w.error for name, w in workers.items()):
        for name, worker in workers.items():
            records[name] += worker.ask("turn") or []
        if reference and (rate := reference.ask("rate")):
            rates.append(rate)
    return records, rates
