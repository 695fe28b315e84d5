import dataclasses

import pytest
import torch
from runs import tiny_config, tiny_dataset, tiny_session

from experiments.study import training
from experiments.study.folder import Request, Study
from model.errors import UsageError
from model.presets import laptop
from profiling.output.terminal import Terminal


def test_smaller_subsets_are_parts_of_larger_ones_and_not_in_the_files_order():
    data = dataclasses.replace(tiny_dataset(), train_labels=torch.arange(70))
    few, many = (training.subset(data, n) for n in (20, 50))
    chosen = many.train_labels.tolist()
    assert few.train_labels.tolist() == chosen[:20] != list(range(20))
    assert len(set(chosen)) == 50
    assert torch.equal(few.train_images, data.train_images[chosen[:20]])


def test_recipes_scale_the_rate_linearly_and_take_the_command_lines_settings():
    scaled = training.at_batch(laptop(), 512, 1.1)
    assert (scaled.batch_size, scaled.lr_values) == (512, pytest.approx((0, 0.6 * 2 * 1.1, 0)))
    config = training.recipe(Request(settings=("momentum=0.5",), seed=3), tiny_session())
    assert (config.preset, config.batch_size, config.momentum, config.seed) == ("laptop", 128, 0.5, 3)
    assert max(config.lr_values) == pytest.approx(0.3)
    trainer = training.prepare(tiny_session(), training.at_constant_rate(tiny_config(), 0.3, 4, 2), tiny_dataset())
    assert [trainer.step.learning_rate(n) for n in (0, 4, 8, 12, 16)] == pytest.approx([0, 0.15, 0.3, 0.3, 0.3])
    flat = training.at_constant_rate(tiny_config(), 0.3, 4)
    assert (flat.lr_values, flat.epochs) == ((0.3, 0.3), 4)


def test_fit_is_the_trainers_own_training_and_a_blow_up_is_a_result():
    seen, losses = [], []
    found = training.fit(training.prepare(tiny_session(), tiny_config(), tiny_dataset()), seen.append)
    trainer = training.prepare(tiny_session(), tiny_config(), tiny_dataset())
    for epoch in range(3):
        list(trainer.train(epoch))
        losses.append(trainer.epoch_result()[0])
    assert found == {"losses": losses, "diverged_step": None}
    assert sum(seen) == 3 * 70
    config = training.at_constant_rate(tiny_config(), 1e38, 3)
    blown = training.fit(training.prepare(tiny_session(), config, tiny_dataset()), seen.append)
    assert blown["diverged_step"] in range(1, 13)
    assert blown["losses"][-1] is None


def test_speed_is_measured_on_fewer_images_than_a_batch_too():
    assert training.images_per_s(tiny_session(), tiny_config(batch_size=20), 10) > 0


def test_another_recipe_is_told_by_its_name(tmp_path):
    Study("x", tmp_path, training.identity(tiny_config()), Terminal(speaks=False))
    with pytest.raises(UsageError, match=r"other settings \(recipe momentum: 0.9, now 0.5\)"):
        Study("x", tmp_path, training.identity(tiny_config(momentum=0.5)), Terminal(speaks=False))
