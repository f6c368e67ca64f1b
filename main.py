"""Adapt CLIP to an image classification task from a few images per class, with SO.

python main.py                                                    # the embedded default
python main.py --root_path $DATA --dataset eurosat --shots 16     # the main job
python main.py --help
"""

import sys
import time
from collections.abc import Sequence

import clip
from datasets import build_dataset
from datasets.loader import Loader
from optimizers import SO
from optimizers.sampled import sample_gradients
from run_utils import (
    describe,
    exit_status,
    finished,
    open_folder,
    parse_args,
    prepare_machine,
    print_results,
    run_folder,
    whats_next,
    write_curve,
    write_result,
)
from train import (
    NonFiniteLoss,
    compile_blocks,
    evaluate,
    select_matrices,
    tokenize_prompts,
    train,
)
from utils import load_weights, save_weights, weights_digest


def main(argv: Sequence[str] | None = None) -> None:
    """Measure zero-shot accuracy, adapt, measure again, and leave a folder of results."""
    start = time.perf_counter()
    config = parse_args(argv)
    folder = run_folder(config)
    weights = folder / f"{config.filename}.safetensors"
    if result := finished(folder, config):
        print(f"This run is finished: {folder}")
        return print_results(result)

    device = prepare_machine(config.device, config.threads, config.seed)
    dataset = build_dataset(config.dataset, config.root_path, config.shots)
    model, _ = clip.load(config.backbone, device)
    matrices = select_matrices(model, config.encoder, config.position)
    prompts = tokenize_prompts(model, dataset.classnames, dataset.template)
    loader = Loader(model.visual.input_resolution, config.num_workers, config.cache_mb)

    def test_accuracy(desc: str) -> float:
        batches = loader.test_batches(dataset.test, batch_size=256)
        return evaluate(model, batches, len(dataset.test), prompts, config.precision, desc)

    if config.eval_only:
        load_weights(weights, model)
        return print_results({"final_accuracy": test_accuracy("Test")}, "final_accuracy")

    open_folder(folder, config)
    optimizer = SO(
        matrices.values(), lr=config.lr, density_ratio=1 - config.s, T=config.t, seed=config.seed
    )
    if config.compile:
        compile_blocks(model)
    elif not config.dense_grad:
        sample_gradients(model, optimizer)
    describe(config, dataset, matrices, device)
    base = weights_digest(model) if config.save_weights else ""
    zero_shot = test_accuracy("Zero-shot test")
    print_results({"zero_shot_accuracy": zero_shot}, "zero_shot_accuracy")
    batches = loader.train_batches(
        dataset.train_x, config.batch_size, config.seed, config.crop_scale, config.crop_ratio,
        config.flip,
    )  # fmt: skip
    try:
        curve = train(
            model, optimizer, batches, prompts, iterations=config.n_iters * config.shots,
            logit_scale=config.logit_scale, early_stop_loss=config.early_stop_loss,
            precision=config.precision, text_chunk=config.text_chunk,
        )  # fmt: skip
    except NonFiniteLoss as error:
        write_curve(folder, error.rows)
        raise
    final = test_accuracy("Final test")
    print_results({"final_accuracy": final}, "final_accuracy")

    curve[-1] = (*curve[-1][:-1], final)
    write_curve(folder, curve)
    if config.save_weights:
        save_weights(weights, matrices, base)
    seconds = round(time.perf_counter() - start, 3)
    accuracies = {"zero_shot_accuracy": zero_shot, "final_accuracy": final}
    write_result(folder, config, device, **accuracies, iterations=len(curve), wall_seconds=seconds)
    whats_next(config, folder)


if __name__ == "__main__":
    sys.exit(exit_status(main))
