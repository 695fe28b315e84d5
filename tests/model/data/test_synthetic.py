"""The generated images: the same bytes everywhere, and neither trivial nor hopeless to learn."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.data import synthetic


@pytest.fixture(scope="module")
def arrays():
    return synthetic.generate(2_000, 500)


def test_bytes_are_the_same_on_every_machine():
    digest = hashlib.sha256(b"".join(array.tobytes() for array in synthetic.generate(200, 100, seed=7)))
    assert digest.hexdigest() == "f2e619e9a33994c42c3de8f907c1ab9829f850b61c197da040443fa942eaafb6"


def test_seeds_and_splits_differ(arrays):
    train_images, _, test_images, _ = arrays
    assert not np.array_equal(train_images[:500], test_images)
    assert not np.array_equal(synthetic.generate(10, 0, seed=1)[0], synthetic.generate(10, 0, seed=0)[0])
    distinct = {image.tobytes() for image in np.concatenate([train_images, test_images])}
    assert len(distinct) == 2_500


@pytest.mark.parametrize(
    ("train", "test"),
    [
        pytest.param(200, 100, id="balanced"),
        pytest.param(13, 7, id="not_a_multiple_of_ten"),
        pytest.param(0, 1, id="no_training_images"),
    ],
)
def test_shapes_types_and_balance(train, test):
    train_images, train_labels, test_images, test_labels = synthetic.generate(train, test)
    for images, labels, count in [(train_images, train_labels, train), (test_images, test_labels, test)]:
        assert images.shape == (count, 32, 32, 3)
        assert images.dtype == np.uint8
        assert images.flags.c_contiguous
        assert labels.shape == (count,)
        assert labels.dtype == np.int64
        counts = np.bincount(labels, minlength=10)
        assert len(counts) == len(synthetic.SHAPES) == 10
        assert counts.max() - counts.min() <= 1


def test_pixels_are_distributed_roughly_like_photographs(arrays):
    pixels = arrays[0].reshape(-1, 3).astype(np.float64)
    assert np.all(np.abs(pixels.mean(0) - 125) < 10)
    assert np.all(np.abs(pixels.std(0) - 60) < 10)


def least_squares_accuracy(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor, ridge: float) -> float:
    """Test accuracy of the linear classifier that ridge regression onto one-hot labels gives."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    w = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ F.one_hot(labels, 10).float())
    return ((x_test @ w).argmax(1) == labels_test).float().mean().item()


def convolutional_features(images: Tensor) -> Tensor:
    """Two random convolutions, pooled over the image: what is where no longer counts."""
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(24, 3, 5, 5, generator=generator)
    w1 -= w1.mean((2, 3), keepdim=True)
    w2 = torch.randn(64, 24, 5, 5, generator=generator) / 25
    x = (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)
    x = F.max_pool2d(F.conv2d(x, w1, padding=2).abs(), 2)
    x = F.max_pool2d(F.conv2d(x - x.mean((2, 3), keepdim=True), w2).relu(), 2)
    return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def test_convolutions_beat_a_linear_classifier(arrays):
    images, labels, images_test, labels_test = (torch.from_numpy(array) for array in arrays)
    x, x_test = (a.permute(0, 3, 1, 2).float() for a in (images, images_test))
    pixels, pixels_test = (F.avg_pool2d(a, 2).flatten(1) for a in (x, x_test))
    linear = max(least_squares_accuracy(pixels, labels, pixels_test, labels_test, r) for r in (1e2, 1e4))
    features, features_test = convolutional_features(x), convolutional_features(x_test)
    convolutional = least_squares_accuracy(features, labels, features_test, labels_test, 10.0)
    print(f"linear {linear:.3f}, random convolutions {convolutional:.3f}")
    assert linear < 0.2
    assert convolutional > 0.25
