"""The field's other protocols: from base to new classes, and from one dataset to others."""

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import NamedTuple

from datasets import DATASETS
from reporting.aggregate import (
    PUBLISHED,
    BackboneResults,
    MeanStd,
    Variant,
    display_name,
    label_datasets,
    mean_if_equal,
    seed_means,
    summarize,
    table_lines,
    zero_shot_mean,
)
from reporting.markdown import markdown
from reporting.tables import ZERO_SHOT, format_mean
from runs.records import Run

BASE_TO_NEW = "From base to new classes"
EXPLANATIONS = {
    BASE_TO_NEW: "Trained on base classes, the first half; accuracy on test images of these, and "
    "on those of the other half, each among its own classes: mean ± standard deviation over seeds "
    "(number of seeds). H is each seed's harmonic mean of the two, 2 b n / (b + n); in lines with "
    "a mean over datasets that of the means.",
    "": "Trained only on the first dataset and tested on the others, each with its own classes: "
    "mean ± standard deviation over seeds (number of seeds). The average is over the others.",
}


class ProtocolRow(NamedTuple):
    """A line of protocols.csv; None is an empty field."""

    backbone: str
    protocol: str
    dataset: str  # that of the training, or a mean over several
    shots: int | None
    method: str
    settings: str
    tested_on: str  # base, new, H (their harmonic mean), a dataset, or average
    mean: float | None
    std: float | None
    seeds: int | None


def base_to_new(results: BackboneResults) -> list[ProtocolRow]:
    """Return base, new and harmonic mean by shots, dataset (the mean last) and variant."""
    if any(run.new_accuracy is None for run in results.runs()):
        return []  # not trained on base classes
    rows = []
    for shots in results.shots:
        lines = product(table_lines(results, shots), [ZERO_SHOT, *results.variants])
        for (name, datasets, seeds), variant in lines:
            if variant == ZERO_SHOT:
                keys = "zero_shot_accuracy", "zero_shot_new_accuracy"
                base, new = ([zero_shot_mean(results, datasets, key)] for key in keys)
            else:
                cell = results, datasets, seeds, shots, variant
                base, new = seed_means(*cell), seed_means(*cell, "new_accuracy")
            if base and None not in (*base, *new):
                both = [harmonic_mean(b, n) for b, n in zip(base, new, strict=True)]
                where = results.name, BASE_TO_NEW, name, shots, *variant
                for column, values in {"base": base, "new": new, "H": both}.items():
                    rows.append(ProtocolRow(*where, column, *summarize_cell(values, variant)))
    return rows


def harmonic_mean(base: float, new: float) -> float:
    """Return the harmonic mean of two accuracies."""
    return 2 * base * new / (base + new) if base + new else 0.0


def transfer(results: BackboneResults) -> list[ProtocolRow]:
    """Return accuracies on a source and its targets, by source, protocol, shots and variant."""
    rows = []
    for source in results.datasets:
        runs = [run for run in results.runs(source) if run.transfer]
        pairs = [(run, name) for run in runs for name in run.transfer]
        labels, order = label_datasets([(name, run.transfer[name]["data"]) for run, name in pairs])
        reached: dict[Run, dict[str, dict]] = {run: {} for run in runs}  # by label of the target
        protocols = {}
        for (run, name), label in zip(pairs, labels, strict=True):
            reached[run][label] = run.transfer[name]
            protocols[label] = f"{protocol_of(name)} from {display_name(source)}"
        for protocol in sorted(set(protocols.values()), reverse=True):
            targets = [label for label in order if protocols[label] == protocol]
            tested = {run: on for run, on in reached.items() if on.keys() & set(targets)}
            for shots, variant in [(None, ZERO_SHOT), *product(results.shots, results.variants)]:
                key = "zero_shot_accuracy" if variant == ZERO_SHOT else "final_accuracy"
                cell = tested if shots is None else results.cell(source, shots, variant).values()
                cell = [run for run in cell if run in tested]
                columns = {source: [getattr(run, key) for run in cell]}
                for target in targets:
                    columns[target] = [tested[r][target][key] for r in cell if target in tested[r]]
                on_all = [tested[run] for run in cell if set(targets) <= tested[run].keys()]
                columns["average"] = [fmean(on[t][key] for t in targets) for on in on_all]
                where = results.name, protocol, source, shots, *variant
                rows += [
                    ProtocolRow(*where, column, *summarize_cell(values, variant))
                    for column, values in columns.items()
                    if values
                ]
    return rows


def protocol_of(target: str) -> str:
    """Return the name of the protocol that tests on this dataset."""
    is_variant = target in DATASETS and DATASETS[target].test_only
    return "Domain generalization" if is_variant else "Cross-dataset transfer"


def summarize_cell(values: Sequence[float], variant: Variant) -> MeanStd:
    """Return mean and standard deviation over seeds; zero-shot accuracies have no seeds."""
    if variant == ZERO_SHOT:
        return MeanStd(mean_if_equal(values), None, None)
    return summarize(values)


def protocol_sections(rows: Sequence[ProtocolRow]) -> str:
    """Return the Markdown sections of the protocols, a table for each; "" where there is none."""
    parts = []
    for protocol in dict.fromkeys(row.protocol for row in rows):
        protocol_rows = [row for row in rows if row.protocol == protocol]
        columns = list(
            dict.fromkeys(row.tested_on for row in protocol_rows)
        )  # zero-shot has all of them
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in protocol_rows:
            label = Variant(row.method, row.settings).label
            line = lines.setdefault((display_name(row.dataset), str(row.shots or "-"), label), {})
            line[row.tested_on] = format_mean(row.mean, row.std, row.seeds)
        body = [[*key, *(line.get(name, "-") for name in columns)] for key, line in lines.items()]
        header = ["dataset", "shots", "method", *map(display_name, columns)]
        explanation = EXPLANATIONS.get(protocol, EXPLANATIONS[""])
        if protocol == BASE_TO_NEW:
            explanation += f" {published_base_to_new()}"
        parts += [f"### {protocol}", explanation, markdown(header, body, left=3)]
    return "\n\n".join(parts) + "\n" if parts else ""


def published_base_to_new() -> str:
    """Return the sentence with the figures that others published."""
    figures = [
        f"{row['method']} {row['base']:.2f}, {row['new']:.2f}, "
        f"{harmonic_mean(row['base'], row['new']):.2f} ({row['source']})"
        for row in PUBLISHED["base_to_new"]
    ]
    return f"Published, {PUBLISHED['backbone']}, mean over eleven: {'; '.join(figures)}."
