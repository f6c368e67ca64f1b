"""The catalog of datasets: one row each, in the order of DATASETS.md."""

import os
from functools import partial

from datasets import readers
from datasets.base import DatasetInfo
from datasets.digits import SPLIT_FILE, build_digits
from datasets.image_folder import custom_dataset_info, dataset_stem, is_path
from utils import did_you_mean

# fmt: off
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}
CALTECH_NAMES = {
    "airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
}
CALTECH_IGNORED = ("BACKGROUND_Google", "Faces_easy")
CLIP_TEMPLATES = (  # the seven general prompts of CLIP's authors
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)

DATASETS: dict[str, DatasetInfo] = {
    "imagenet": DatasetInfo(
        "ImageNet", dataset_dirs=("imagenet/images", "imagenet"), num_classes=1000,
        num_images=(1281167, None, 50000), val_from_train=True,
        read_data=readers.read_imagenet, required_subdirs=("train", "val"),
        aliases=("ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC/Data/CLS-LOC",
                 "imagenet/ILSVRC/Data/CLS-LOC"),
    ),
    "sun397": DatasetInfo(
        "SUN397", dataset_dirs=("sun397", "SUN397"), image_dir="SUN397",
        num_classes=397, num_images=(15880, 3970, 19850),
        split_file="split_zhou_SUN397.json", read_data=readers.read_sun397,
        aliases=("SUN397",),
    ),
    "fgvc": DatasetInfo(
        "FGVC-Aircraft", image_dir="images",
        dataset_dirs=("fgvc_aircraft", "fgvc_aircraft/data", "fgvc-aircraft-2013b/data"),
        num_classes=100, num_images=(3334, 3333, 3333), read_data=readers.read_fgvc,
        template="a photo of a {}, a type of aircraft.",
        aliases=("fgvc-aircraft-2013b", "FGVCAircraft", "FGVC-Aircraft"),
    ),
    "eurosat": DatasetInfo(
        "EuroSAT", dataset_dirs=("eurosat",), image_dir="2750", aliases=("EuroSAT", "EuroSAT_RGB"),
        num_classes=10, num_images=(13500, 5400, 8100), split_file="split_zhou_EuroSAT.json",
        read_data=partial(readers.read_class_folders, names=EUROSAT_NAMES),
        template="a centered satellite photo of {}.",
    ),
    "stanford_cars": DatasetInfo(
        "Stanford Cars", dataset_dirs=("stanford_cars", "StanfordCars"),
        num_classes=196, num_images=(6509, 1635, 8041),
        split_file="split_zhou_StanfordCars.json", read_data=readers.read_cars,
        required_subdirs=("cars_train", "cars_test"),
        aliases=("stanford-cars-dataset", "stanford-cars", "cars"),
    ),
    "food101": DatasetInfo(
        "Food-101", dataset_dirs=("food-101", "Food101"), image_dir="images",
        num_classes=101, num_images=(50500, 20200, 30300),
        split_file="split_zhou_Food101.json", read_data=readers.read_class_folders,
        template="a photo of {}, a type of food.", aliases=("food101", "Food-101", "food41"),
    ),
    "oxford_pets": DatasetInfo(
        "Oxford-IIIT Pets", dataset_dirs=("oxford_pets", "OxfordPets"), image_dir="images",
        num_classes=37, num_images=(2944, 736, 3669),
        split_file="split_zhou_OxfordPets.json", read_data=readers.read_pets,
        template="a photo of a {}, a type of pet.",
        aliases=("oxford-iiit-pet", "OxfordIIITPet", "the-oxfordiiit-pet-dataset", "pets"),
    ),
    "oxford_flowers": DatasetInfo(
        "Flowers-102", dataset_dirs=("oxford_flowers", "Flower102"), image_dir="jpg",
        num_classes=102, num_images=(4093, 1633, 2463),
        split_file="split_zhou_OxfordFlowers.json", read_data=readers.read_flowers,
        template="a photo of a {}, a type of flower.",
        aliases=("flowers-102", "102flowers", "flowers102", "Flowers102", "oxford-102-flowers"),
    ),
    "caltech101": DatasetInfo(
        "Caltech-101", dataset_dirs=("caltech-101", "Caltech101"),
        image_dir="101_ObjectCategories", num_classes=100, num_images=(4128, 1649, 2465),
        split_file="split_zhou_Caltech101.json",
        read_data=partial(readers.read_class_folders, names=CALTECH_NAMES, ignored=CALTECH_IGNORED),
        aliases=("caltech101", "Caltech-101", "caltech_101", "caltech101_classes",
                 "101_ObjectCategories"),
    ),
    "dtd": DatasetInfo(
        "DTD", dataset_dirs=("dtd", "DTD"), image_dir="images", template="{} texture.",
        num_classes=47, num_images=(2820, 1128, 1692), read_data=readers.read_class_folders,
        split_file="split_zhou_DescribableTextures.json",
        aliases=("dtd-r1.0.1", "describable-textures-dataset-dtd"),
    ),
    "ucf101": DatasetInfo(
        "UCF101", dataset_dirs=("ucf101", "UCF101"), image_dir="UCF-101-midframes",
        num_classes=101, num_images=(7639, 1898, 3783),
        split_file="split_zhou_UCF101.json", read_data=readers.read_ucf101,
        template="a photo of a person doing {}.",
        aliases=("UCF-101", "ucf-101", "UCF-101-midframes", "UCF101_midframes"),
    ),
    # Other images of ImageNet's classes, or of some of them
    "imagenetv2": DatasetInfo(
        "ImageNetV2", dataset_dirs=("imagenetv2",),
        image_dir="imagenetv2-matched-frequency-format-val",
        num_classes=1000, num_images=(0, 0, 10000), read_data=readers.read_imagenet_variant,
        aliases=("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
    ),
    "imagenet_sketch": DatasetInfo(
        "ImageNet-Sketch", dataset_dirs=("imagenet-sketch",), image_dir="images",
        num_classes=1000, num_images=(0, 0, 50889), read_data=readers.read_imagenet_variant,
        aliases=("ImageNet-Sketch", "imagenet_sketch", "sketch"),
    ),
    "imagenet_a": DatasetInfo(
        "ImageNet-A", dataset_dirs=("imagenet-adversarial",), image_dir="imagenet-a",
        num_classes=200, num_images=(0, 0, 7500), read_data=readers.read_imagenet_variant,
        aliases=("imagenet-a", "imagenet_a"),
    ),
    "imagenet_r": DatasetInfo(
        "ImageNet-R", dataset_dirs=("imagenet-rendition",), image_dir="imagenet-r",
        num_classes=200, num_images=(0, 0, 30000), read_data=readers.read_imagenet_variant,
        aliases=("imagenet-r", "imagenet_r"),
    ),
    "digits": DatasetInfo(
        "Digits", dataset_dirs=("digits",), image_dir="images", split_file=SPLIT_FILE,
        num_classes=10, num_images=(898, 359, 540), prepare=build_digits,
    ),
}
# fmt: on


def get_dataset_info(name: str) -> DatasetInfo:
    """Return the row of a dataset: of the catalog, or one made for a path of own images."""
    name = os.fspath(name)
    if name in DATASETS:
        return DATASETS[name]
    if is_path(name):
        return custom_dataset_info(name)
    raise ValueError(
        f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; valid: {', '.join(DATASETS)}, or "
        "the path of your own images: a folder, a .csv or a .json"
    )


def dataset_name(name: str) -> str:
    """Return what results call a dataset: its name, or the stem of its folder or file."""
    return name if name in DATASETS else dataset_stem(name)
