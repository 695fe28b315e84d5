import pytest

from model.network import ResNet, ResNet9
from profiling.account.flops import flops_per_image
from profiling.device.specifications import V100_FLOPS_PER_S


@pytest.mark.parametrize(
    ("build", "forward", "training"),
    [
        (ResNet, 0.920e9, 2.7565e9),
        (lambda: ResNet(prep_bn_relu=True), 0.920e9, 2.7565e9),
        (ResNet9, 0.7585e9, 2.2720e9),
        (lambda: ResNet9(pool_first=True), 0.7585e9, 2.2720e9),
    ],
    ids=["article", "redundant_bn", "resnet9", "resnet9_pool_first"],
)
def test_flops_are_the_article_s(build, forward, training):
    counted = flops_per_image(build)
    assert counted.forward == pytest.approx(forward, rel=1e-4)
    assert counted.training == pytest.approx(training, rel=1e-4)


def test_the_closed_formula_agrees():
    """2 K C R S P Q for each convolution, three passes, less the first one's gradient with respect to the image."""
    layers = [(3, 64, 3, 32)]
    c, size = 64, 32
    for stage, k in enumerate((64, 128, 256, 256)):
        size = size if stage == 0 else size // 2
        layers += [(c, k, 3, size), (k, k, 3, size), (k, k, 3, size), (k, k, 3, size)]
        if stage:
            layers.append((c, k, 1, size))
        c = k
    assert len(layers) == 20
    convolutions = sum(2 * k * c * r * r * p * p for c, k, r, p in layers)
    linear = 2 * 512 * 10
    first = 2 * 64 * 3 * 9 * 32 * 32
    counted = flops_per_image(ResNet)
    assert counted.forward == convolutions + linear
    assert counted.training == 3 * (convolutions + linear) - first


def test_the_article_s_forty_seconds():
    assert flops_per_image(ResNet).training * 50_000 * 35 / V100_FLOPS_PER_S == pytest.approx(38.6, abs=0.05)
