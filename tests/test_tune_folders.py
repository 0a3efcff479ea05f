"""Data in folders: idx files and arrays, and what is wrong with a folder that cannot be read."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from normwise.errors import StudyError
from normwise.tuning import datasets
from normwise.tuning.data import load
from normwise.tuning.idx import FASHION, read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 4, 5), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 3


def message(source: object) -> str:
    with pytest.raises(StudyError) as caught:
        load(source, "cross_entropy")  # type: ignore[arg-type]
    return str(caught.value)


def idx(array: np.ndarray) -> bytes:
    """The bytes of an idx file, as its authors describe it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 32 images to train on, compressed, and 8 to test with, not."""
    for name, part in (("train", slice(8, None)), ("t10k", slice(8))):
        for kind, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS)):
            content, path = idx(array[part]), tmp_path / f"{name}-{kind}-ubyte"
            if name == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return tmp_path


def test_a_folder_of_idx_files_compressed_or_not(images: Path) -> None:
    data = load(str(images), "cross_entropy")
    assert [tuple(split.inputs.shape) for _, split in data.splits()] == [(24, 1, 4, 5), (8, 1, 4, 5), (8, 1, 4, 5)]
    assert data.label == str(images)
    assert data.facts["data"] == f"{images}: images of 4x5 pixels"
    assert data.test.targets.tolist() == LABELS[:8].tolist()
    everything = torch.cat([data.train.inputs, data.validation.inputs])[:, 0]
    labels = torch.cat([data.train.targets, data.validation.targets])
    assert data.train.inputs.mean().abs() < 1e-5
    assert data.train.inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    given = torch.tensor(IMAGES[8:]).flatten(1).float()
    order = torch.cdist(everything.flatten(1), (given - given.mean()) / given.std()).argmin(dim=1)
    assert sorted(order.tolist()) == list(range(32))  # each image once, with its own label
    assert labels.equal(torch.tensor(LABELS[8:])[order].long())


def test_test_images_are_standardized_with_the_training_set(images: Path) -> None:
    data = load(str(images), "cross_entropy")
    pixels = torch.tensor(IMAGES[:8]).float()
    slopes = data.test.inputs[:, 0].flatten().diff() / pixels.flatten().diff()
    slopes = slopes[pixels.flatten().diff() != 0]
    assert slopes.std() < 1e-4
    assert slopes.mean().item() == pytest.approx(1 / pixels.std().item(), rel=0.1)
    assert data.test.inputs.mean().abs() > 1e-4  # not with its own mean


def test_damaged_idx_files_are_named(images: Path) -> None:
    train, labels = images / "train-images-idx3-ubyte.gz", images / "t10k-labels-idx1-ubyte"
    whole = gzip.decompress(train.read_bytes())
    train.write_bytes(gzip.compress(whole[:-7]))
    assert message(str(images)) == (
        f"{train} has 649 bytes where its header, 32 x 4 x 5, needs 656: it is cut off or damaged; fetch it again"
    )
    train.write_bytes(gzip.compress(whole)[:-30])
    assert message(str(images)) == (
        f"{train} cannot be read: Compressed file ended before the end-of-stream marker was reached; fetch it again"
    )
    train.write_bytes(b"<html>404</html>")
    assert message(str(images)) == f"{train} cannot be read: Not a gzipped file (b'<h'); fetch it again"
    train.write_bytes(gzip.compress(whole))
    labels.write_bytes(idx(IMAGES))
    assert message(str(images)) == (
        f"{labels} begins with 00 00 08 03, where an idx file of bytes in 1 dimensions begins with 00 00 08 01: it is "
        "damaged or another kind of file"
    )
    labels.write_bytes(b"")
    assert message(str(images)).startswith(f"{labels} begins with nothing, where")
    labels.unlink()
    assert message(str(images)) == (
        f"{images} has no t10k-labels-idx1-ubyte.gz or t10k-labels-idx1-ubyte: install Debian's images with "
        "`apt install dataset-fashion-mnist`, or give a folder with idx files as data"
    )


def test_a_header_without_values_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    with pytest.raises(StudyError, match=r"has 6 bytes where its header"):
        read_idx(path, 3)


def test_fashion_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "FASHION", tmp_path / "fashion-mnist")
    assert message("fashion") == (
        f"no {tmp_path / 'fashion-mnist'}: install Debian's images with `apt install dataset-fashion-mnist`, or give a "
        "folder with idx files as data"
    )


@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_has_seventy_thousand_images_in_ten_classes() -> None:
    data = load("fashion", "cross_entropy")
    assert [tuple(split.inputs.shape) for _, split in data.splits()] == [
        (58000, 1, 28, 28),
        (2000, 1, 28, 28),
        (10000, 1, 28, 28),
    ]
    counts = torch.cat([split.targets for _, split in data.splits()]).bincount()
    assert counts.tolist() == [7000] * 10
    assert data.train.inputs.std(correction=0).item() == pytest.approx(1, abs=1e-3)


ARRAYS = {"X_train": IMAGES[:20], "y_train": LABELS[:20], "X_test": IMAGES[20:], "y_test": LABELS[20:]}
VALIDATION = {"X_val": IMAGES[:9], "y_val": LABELS[:9]}


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    for name, array in {**ARRAYS, "unrelated": LABELS}.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = load(str(tmp_path), "cross_entropy")
    assert [len(split) for _, split in data.splits()] == [15, 5, 20]
    assert data.facts["split"].endswith(
        "a quarter of the training data held out for validation, drawn with split seed 0"
    )
    assert data.test.inputs.equal(torch.tensor(IMAGES[20:]).float())
    for name, array in VALIDATION.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = load(str(tmp_path), "cross_entropy")
    assert [len(split) for _, split in data.splits()] == [20, 9, 20]
    assert data.facts["split"] == "20 training, 9 validation and 20 test examples; as the data came"
    assert data.validation.targets.tolist() == LABELS[:9].tolist()


def test_an_archive_by_its_name_or_alone_in_a_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", **ARRAYS, **VALIDATION)
    given = load((*((arrays[f"X_{part}"], arrays[f"y_{part}"]) for part, arrays in
        (("train", ARRAYS), ("val", VALIDATION), ("test", ARRAYS))),), "cross_entropy")  # fmt: skip
    for source in (tmp_path / "all.npz", tmp_path):
        assert load(str(source), "cross_entropy").fingerprint() == given.fingerprint()


def test_what_is_no_folder_of_data_is_told(tmp_path: Path) -> None:
    names = "name the arrays X_train, y_train, X_test, y_test and, if there are any, X_val, y_val"
    assert message(f"{tmp_path}/gone") == f"no data at '{tmp_path}/gone': there is no such file or folder"
    assert message(str(tmp_path)) == (
        f"{tmp_path} has no X_train for the training data (there are no arrays and no idx files): {names}"
    )
    for name in ("X_train", "y_train", "X_test"):
        np.save(tmp_path / f"{name}.npy", ARRAYS[name])
    assert message(str(tmp_path)) == (
        f"{tmp_path} has no y_test for the test data (there are X_test, X_train, y_train): {names}"
    )
    np.save(tmp_path / "y_test.npy", np.array(["a", None], dtype=object))
    assert message(str(tmp_path)).startswith(
        f"{tmp_path / 'y_test.npy'} cannot be read: ValueError: Object arrays cannot be loaded when allow_pickle=False"
    )
    (tmp_path / "notes.txt").write_text("none")
    assert message(str(tmp_path / "notes.txt")) == (
        f"{tmp_path / 'notes.txt'} is no .npz file; give one, a folder of .npy files, or a folder of idx files"
    )
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    assert message(str(tmp_path / "broken.npz")).startswith(f"{tmp_path / 'broken.npz'} cannot be read: ")
