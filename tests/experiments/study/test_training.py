import dataclasses

import pytest
import torch
from runs import tiny_config, tiny_dataset, tiny_session

from experiments.study import training
from experiments.study.folder import Request
from model.presets import laptop


def test_smaller_subsets_are_parts_of_larger_ones_and_not_in_the_files_order():
    data = dataclasses.replace(tiny_dataset(), train_labels=torch.arange(70))
    small, large = (training.subset(data, n).train_labels.tolist() for n in (20, 50))
    assert small == large[:20]
    assert small != list(range(20))
    assert len(set(large)) == 50
    for i, label in enumerate(small):
        assert torch.equal(training.subset(data, 20).train_images[i], data.train_images[label])


def test_rates_scale_linearly_with_the_batch():
    config = training.at_batch(laptop(), 512, 1.1)
    assert config.batch_size == 512
    assert config.lr_values == pytest.approx((0, 0.6 * 2 * 1.1, 0))


def test_a_ramp_and_a_constant_rate():
    config = training.at_constant_rate(tiny_config(), 0.3, 4, 2)
    trainer = training.prepare(tiny_session(), config, tiny_dataset())
    assert [trainer.step.learning_rate(n) for n in (0, 4, 8, 12, 16)] == pytest.approx([0, 0.15, 0.3, 0.3, 0.3])
    flat = training.at_constant_rate(tiny_config(), 0.3, 4)
    assert (flat.lr_values, flat.epochs) == ((0.3, 0.3), 4)


def test_fit_is_the_trainers_own_training():
    config, seen = tiny_config(), []
    found = training.fit(training.prepare(tiny_session(), config, tiny_dataset()), seen.append)
    trainer = training.prepare(tiny_session(), config, tiny_dataset())
    losses = []
    for epoch in range(3):
        list(trainer.train(epoch))
        losses.append(trainer.epoch_result()[0])
    assert found == {"losses": losses, "diverged_step": None}
    assert sum(seen) == 3 * 70


def test_a_run_that_blows_up_is_a_result():
    config = training.at_constant_rate(tiny_config(), 1e38, 3)
    found = training.fit(training.prepare(tiny_session(), config, tiny_dataset()), lambda n: None)
    assert found["diverged_step"] in range(1, 13)
    assert found["losses"][-1] is None


def test_the_recipe_is_laptops_at_the_articles_batch_with_what_the_command_line_says():
    config = training.recipe(Request(settings=("momentum=0.5",), seed=3), tiny_session())
    assert (config.preset, config.batch_size, config.momentum, config.seed) == ("laptop", 128, 0.5, 3)
    assert max(config.lr_values) == pytest.approx(0.3)


def test_speed_is_measured_on_fewer_images_than_a_batch_too():
    assert training.images_per_s(tiny_session(), tiny_config(batch_size=20), 10) > 0


def test_another_recipe_is_told_by_its_name(tmp_path):
    from experiments.study.folder import Study
    from model.errors import UsageError
    from profiling.output.terminal import Terminal

    Study("x", tmp_path / "a", training.identity(tiny_config()), Terminal(speaks=False))
    with pytest.raises(UsageError, match=r"other settings \(recipe momentum: 0.9, now 0.5\)"):
        Study("x", tmp_path / "a", training.identity(tiny_config(momentum=0.5)), Terminal(speaks=False))
