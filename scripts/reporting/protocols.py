"""The field's other protocols: from base to new classes, and from one dataset to others."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from datasets import DATASETS
from reporting.aggregate import (
    PUBLISHED,
    ZERO_SHOT,
    BackboneResults,
    display_name,
    group_runs,
    summarize,
)
from reporting.markdown import markdown
from reporting.tables import MEANS, format_mean

BASE_TO_NEW = (
    "Trained on base classes, the first half; accuracy on test images of these, and on those of "
    "the other half, each among its own classes: mean ± standard deviation over seeds (number of "
    "seeds). H is each seed's harmonic mean of the two, 2 b n / (b + n); in lines with a mean over "
    "datasets that of the means."
)


def base_to_new_section(results: BackboneResults) -> str:
    """Return the table of base, new and harmonic mean; "" for runs on all classes."""
    if any(run.new_accuracy is None for run in results.runs()):
        return ""
    lines = []
    for shots in results.shots:
        variants = [ZERO_SHOT, *results.variants]
        for (name, datasets), variant in product(results.table_lines(shots), variants):
            keys = "final_accuracy", "new_accuracy"
            base, new = (results.seed_means(datasets, shots, variant, key) for key in keys)
            if base and new:
                both = [harmonic_mean(b, n) for b, n in zip(base, new, strict=True)]
                means = [format_mean(summarize(v, variant)) for v in (base, new, both)]
                lines.append([display_name(name), str(shots), variant.label, *means])
    table = markdown(["dataset", "shots", "method", "base", "new", "H"], lines, left=3)
    published = [
        f"{row['method']} {row['base']:.2f}, {row['new']:.2f}, "
        f"{harmonic_mean(row['base'], row['new']):.2f} ({row['source']})"
        for row in PUBLISHED["base_to_new"]
    ]
    published = f"Published, {PUBLISHED['backbone']}, mean over eleven: {'; '.join(published)}."
    return f"### From base to new classes\n\n{BASE_TO_NEW} {published}\n\n{table}\n"


def harmonic_mean(base: float, new: float) -> float:
    """Return the harmonic mean of two accuracies."""
    return 2 * base * new / (base + new) if base + new else 0.0


def transfer_results(results: BackboneResults) -> Iterator[BackboneResults]:
    """Yield accuracies on other datasets, as if runs were on these, by source and kind."""
    for source in results.datasets:
        kinds = defaultdict(list)
        for run in results.runs(source):
            for name, values in run.transfer.items():
                is_shifted = name in DATASETS and DATASETS[name].test_only
                kind = "domain generalization" if is_shifted else "cross-dataset transfer"
                fields = ("data", "zero_shot_accuracy", "final_accuracy")
                reached = {key: values[key] for key in fields}
                unknown = dict.fromkeys(MEANS)
                kinds[kind].append(replace(run, dataset=name, **reached, **unknown))
        for kind, runs in sorted(kinds.items()):
            yield group_runs(f"{results.name}, {kind} from {display_name(source)}", runs)
