"""Downloads: torchvision fetches a dataset, and it is moved to where DATASETS.md has it.

An archive is downloaded and unpacked in a hidden folder inside the dataset's own, and moved out
when it is complete, the images last. So a dataset that is there is complete, and what was there
before is not changed. A download that broke off starts again.
"""

import os
import shutil

import torchvision

from datasets.base import DatasetDir, find_dataset_dir, resolve_root, suggest_fix
from datasets.catalog import DATASETS

DOWNLOADS = {  # torchvision's class, and the folder that it unpacks below its root
    "sun397": ("SUN397", "."),
    "fgvc": ("FGVCAircraft", "fgvc-aircraft-2013b/data"),
    "eurosat": ("EuroSAT", "eurosat"),
    "food101": ("Food101", "food-101"),
    "oxford_pets": ("OxfordIIITPet", "oxford-iiit-pet"),
    "oxford_flowers": ("Flowers102", "flowers-102"),
    "caltech101": ("Caltech101", "caltech101"),
    "dtd": ("DTD", "dtd/dtd"),
}
SPLIT_FILES_URL = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
ARCHIVE_EXTENSIONS = (".zip", ".gz", ".tgz", ".tar")
TMP_DIRNAME = ".download"


def download_dataset(name: str, root_path: str | os.PathLike) -> None:
    """Download a dataset into its folder below the root, and print the folder.

    Raises:
        ValueError: torchvision cannot download it, or it is elsewhere below the root.
        ConnectionError: It could not be downloaded or unpacked.
    """
    if name not in DOWNLOADS:
        section = f"; see DATASETS.md, section {DATASETS[name].title}" if name in DATASETS else ""
        raise ValueError(f"{name} cannot be downloaded{section}; valid: {', '.join(DOWNLOADS)}")
    info, root = DATASETS[name], resolve_root(root_path)
    try:
        target = find_dataset_dir(name, info, root)
    except FileNotFoundError:
        target = DatasetDir(name, info, root, root / info.dataset_dirs[0])
    if info.is_complete(target.path):
        print(f"{name} is already in {target.path}: rename that folder to download it again")
    elif hint := suggest_fix(target):
        raise ValueError(f"{name} was downloaded to another place: {'; '.join(hint)}")
    else:
        try:
            _download(target)
        except Exception as error:  # torchvision, the network and archives fail in many ways
            raise ConnectionError(
                f"{name} could not be downloaded ({error}): try again, or see DATASETS.md, section "
                f"{info.title}"
            ) from error
        print(f"{name}: downloaded to {target.path}")
    if info.split_file and not (target.path / info.split_file).exists():
        print(f"{name}: get {info.split_file} from {SPLIT_FILES_URL} and put it there as well")


def _download(target: DatasetDir) -> None:
    """Have torchvision download and unpack a dataset, and move it to its place."""
    class_name, unpacked = DOWNLOADS[target.name]
    tmp_dir = target.path / TMP_DIRNAME
    shutil.rmtree(tmp_dir, ignore_errors=True)  # torchvision would take half of it for the whole
    tmp_dir.mkdir(parents=True)
    getattr(torchvision.datasets, class_name)(tmp_dir, download=True)
    paths = [p for p in (tmp_dir / unpacked).iterdir() if not p.name.endswith(ARCHIVE_EXTENSIONS)]
    for path in sorted(paths, key=lambda path: path.name == target.info.image_dir):
        if not os.path.lexists(target.path / path.name):
            os.rename(path, target.path / path.name)
    shutil.rmtree(tmp_dir)
