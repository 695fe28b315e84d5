import pytest
import torch
from runs import tiny_config

from model.presets import preset
from model.schedule import learning_rate, piecewise_linear, rate_table

KINK = ((0, 15, 15, 30, 35), (0, 0.1, 0.105, 0.005, 0))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0), (7.5, 0.05), (14.999999, 0.1), (15, 0.105), (22.5, 0.055), (30, 0.005), (32.5, 0.0025), (35, 0), (99, 0)],
)
def test_the_schedule_of_the_341_s_entry(epoch, rate):
    assert piecewise_linear(epoch, *KINK) == pytest.approx(rate, abs=1e-8)


def test_before_the_first_knot_the_first_value_holds():
    assert piecewise_linear(-1, (0, 1), (0.5, 1)) == 0.5


def test_the_table_is_the_schedule_at_the_end_of_each_step():
    config = preset("article-341")
    table = rate_table(config, 391)
    assert table.dtype == torch.float32
    assert len(table) == 35 * 391 + 1
    for number in (0, 1, 391 * 15 - 1, 391 * 15, 35 * 391):
        assert float(table[number]) == pytest.approx(learning_rate(config, 391, number) / 128, rel=1e-6)
    assert float(table[391 * 15]) == pytest.approx(0.105 / 128), "the kink"


def test_the_last_rate_holds_after_the_run():
    config = tiny_config(lr_values=(0, 0.1, 0.02))
    assert learning_rate(config, 4, 99) == learning_rate(config, 4, 12) == 0.02
    assert float(rate_table(config, 4)[-1]) == pytest.approx(0.02 / 20)
