import torch

from profiling.bench.gate import disagreement


def test_a_result_may_err_twice_as_much_as_the_library():
    truth = [torch.ones(1000, dtype=torch.float64)]
    baseline = [torch.full((1000,), 1.01)]
    assert disagreement([torch.full((1000,), 1.019)], baseline, truth, torch.float16) is None
    assert "output 0 is off by 0.021" in disagreement([torch.full((1000,), 1.021)], baseline, truth, torch.float16)
    exact = [torch.ones(1000)]
    eps = torch.finfo(torch.float32).eps
    assert disagreement([torch.full((1000,), 1 + 3 * eps)], exact, truth, torch.float16) is None
    assert disagreement([torch.full((1000,), 1 + 6 * eps)], exact, truth, torch.float16) is not None


def test_without_a_baseline_half_of_the_digits_must_be_right():
    truth = [torch.ones(1000, dtype=torch.float64)]
    close, far = (torch.full((1000,), value) for value in (1.02, 1.04))  # sqrt(eps) of fp16 is 0.031
    assert disagreement([close], None, truth, torch.float16) is None
    assert disagreement([far], None, truth, torch.float16) is not None
    assert disagreement([close], None, truth, torch.float32) is not None


def test_nan_and_another_shape_never_pass():
    truth = [torch.ones(4, dtype=torch.float64)]
    assert disagreement([torch.tensor([1.0, 1.0, 1.0, torch.nan])], None, truth, torch.float16) is not None
    assert "shapes" in disagreement([torch.ones(2, 2)], None, truth, torch.float16)
    assert "shapes" in disagreement([torch.ones(4), torch.ones(4)], None, truth, torch.float16)
