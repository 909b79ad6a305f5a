"""Write what the study reads into `data/` beside this file:

    python docs/studies/twelve/prepare.py FOLDER_OF_DATA FOLDER_OF_MODELS

FOLDER_OF_DATA holds sst2, mrpc and rte with train.csv and test.csv each (columns text, text_pair where there are two
sentences, label: 0 or 1, as in GLUE), and cifar10 with train.parquet and test.parquet (columns jpeg: the bytes of an
image, label: 0 to 9 in the order of `SUPER`). FOLDER_OF_MODELS holds cifar10-resnet56.safetensors, the ResNet-56 of
https://github.com/akamaster/pytorch_resnet_cifar10 with the names of `resnet.py`. banking77 comes with the package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow.parquet as parquet
from resnet import CifarResNetConfig, CifarResNetForImageClassification
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

DATA = Path(__file__).parent / "data"
SENTENCES = ("sst2", "mrpc", "rte")
SUPER = {  # the classes in the order of their labels, and the super-class of each
    "airplane": "plane or ship",
    "automobile": "car or truck",
    "bird": "bird or frog",
    "cat": "cat or dog",
    "deer": "deer or horse",
    "dog": "cat or dog",
    "frog": "bird or frog",
    "horse": "deer or horse",
    "ship": "plane or ship",
    "truck": "car or truck",
}
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def sentences(name: str, source: Path) -> None:
    """Copy the training and test rows of one data set."""
    (DATA / name).mkdir(parents=True, exist_ok=True)
    for part in ("train.csv", "test.csv"):
        shutil.copyfile(source / name / part, DATA / name / part)


def images(source: Path) -> None:
    """The images with the names of their super-classes."""
    names = list(SUPER.values())
    (DATA / "cifar10").mkdir(parents=True, exist_ok=True)
    for part in ("train.parquet", "test.parquet"):
        table = parquet.read_table(source / "cifar10" / part)
        labels = [names[label] for label in table["label"].to_pylist()]
        made = table.select(["jpeg"]).rename_columns(["image"]).append_column("label", [labels])
        parquet.write_table(made.replace_schema_metadata(), DATA / "cifar10" / part)


def resnet(source: Path) -> None:
    """ResNet-56 as a folder that `from_pretrained` reads: configuration, weights, what is done to an image."""
    classes = dict(enumerate(SUPER))
    config = CifarResNetConfig(blocks=9, id2label=classes, label2id={name: i for i, name in classes.items()})
    model = CifarResNetForImageClassification(config)
    weights = load_file(source / "cifar10-resnet56.safetensors")
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - counters:
        raise SystemExit(f"the weights are not those of a ResNet-56: {[*unexpected, *missing][:3]}")
    model.save_pretrained(DATA / "resnet56")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=DEVIATION)
    processor.save_pretrained(DATA / "resnet56")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python prepare.py FOLDER_OF_DATA FOLDER_OF_MODELS")
    data, models = (Path(folder) for folder in sys.argv[1:])
    for name in SENTENCES:
        sentences(name, data)
    images(data)
    resnet(models)
    print(f"written: {', '.join(sorted(path.name for path in DATA.iterdir()))} in {DATA}")
