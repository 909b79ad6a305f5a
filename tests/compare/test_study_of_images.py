"""The committed study of five tasks: its ResNet is a model like any other, and its images are rows like any other."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import transformers

import attunement as at
from attunement.compare import trial
from attunement.compare.study import entries, load, made
from attunement.errors import AttunementError
from attunement.train.recipe import methods_of
from attunement.train.tasks import Base, ImageClassification

TWELVE = Path(__file__).parents[2] / "docs" / "studies" / "twelve" / "study.yaml"
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with one block in each stack, for ten classes, as the script of the study writes it."""
    load(TWELVE)  # its `imports` make the architecture known
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("cifar_resnet", blocks=1, num_labels=10)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (250, number, 0) if number % 2 else (0, number, 250)).save(file, "png")
    return file.getvalue()


def test_its_resnet_has_shortcuts_without_parameters(resnet: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(resnet).eval()
    names = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    layers = {f"layer{i}.0.{kind}{j}" for i in (1, 2, 3) for kind in ("conv", "bn") for j in (1, 2)}
    assert names == {"conv1", "bn1", "linear", *layers}
    block, x = model.layer2[0], torch.rand(2, 16, 8, 8)
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    y = block(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_all_but_two_of_its_methods_act_on_the_resnet(resnet: Path) -> None:
    reasons = {}
    rows = {"pixel_values": torch.rand(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    for entry in entries(load(TWELVE))[3:]:
        model = transformers.AutoModelForImageClassification.from_pretrained(resnet)
        try:
            adapter = at.adapt(model, *methods_of(entry.adapter))
        except AttunementError as error:
            reasons[entry.label] = str(error)
            continue
        model(**rows).loss.backward()
        assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad), entry.label
    assert set(reasons) == {"prefix", "lst"}
    assert "which this model has not" in reasons["prefix"]


def test_methods_and_full_fine_tuning_are_compared_on_images(resnet: Path, tmp_path: Path) -> None:
    import datasets

    rows = [{"image": picture(i), "label": "red" if i % 2 else "blue"} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    study = made(
        {
            "name": "images",
            "model": str(resnet),
            "data": str(tmp_path / "rows.parquet"),
            "task": "image-classification",
            "training": {"num_train_epochs": 4, "per_device_train_batch_size": 8, "use_cpu": True},
            "methods": [{"method": "lora", "on": "attention.query|blocks.conv", "as": "lora"}],
            "output": str(tmp_path / "study"),
        },
        "images",
    )
    ground = trial.Ground("images", study.tasks["images"], study.search, tmp_path)
    assert ground.base.config.num_labels == 2
    found = {entry.label: trial.run(ground, entry, 1e-2, 0, "final") for entry in entries(study)}
    assert {label: one.state for label, one in found.items()} == dict.fromkeys(found, "done")
    assert (found["lora"].steps, found["zero-shot"].steps) == (16, 0)
    assert (found["full fine-tuning"].quality or 0) > 0.9


def test_the_path_of_an_image_is_looked_for_beside_its_rows(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "rows" / "pictures").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "rows" / "pictures" / "1.png").write_bytes(picture(1))
    (tmp_path / "here" / "2.png").write_bytes(picture(2))
    monkeypatch.chdir(tmp_path / "here")
    task = ImageClassification(labels=("blue", "red"))
    processor = task.processor(Base(path=str(resnet)))

    def pixels(path: str) -> torch.Tensor:
        table = datasets.Dataset.from_dict({"image": [path], "label": ["red"]})
        return task.encode(table, processor, str(tmp_path / "rows" / "rows.csv"))[0]["pixel_values"]

    assert pixels("pictures/1.png").mean((1, 2)).argmax() == 0  # red
    assert pixels("2.png").mean((1, 2)).argmax() == 2  # blue, of the current folder
    with pytest.raises(AttunementError, match=r"rows.csv: an image cannot be read: .*3.png"):
        pixels("pictures/3.png")
