import pytest
from hypothesis import given
from hypothesis import strategies as st

import singe

PUBLISHED = {
    "vgg16_cifar10": (200, {"every": 15, "per_round": 160, "until": 150}),
    "vgg16_cifar100": (200, {"every": 15, "per_round": 100, "until": 150}),
    "resnet56_cifar": (200, {"every": 21, "per_round": 120, "until": 150}),
    "resnet110_cifar": (200, {"every": 21, "per_round": 120, "until": 150}),
    "resnet34_imagenet": (90, {"every": 9, "per_round": 250, "until": 50}),
}


def rounds(preset):
    return preset["until"] // preset["every"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_as_published(name):
    epochs, expected = PUBLISHED[name]
    assert singe.gradual_preset(name) == singe.gradual_preset(name, epochs) == expected


@given(st.sampled_from(sorted(PUBLISHED)), st.integers(2, 400))
def test_another_number_of_epochs_has_about_the_same_rounds(name, epochs):
    published, original = PUBLISHED[name]
    preset = singe.gradual_preset(name, epochs)
    assert 1 <= preset["every"] <= preset["until"] <= epochs
    assert preset["until"] / epochs == pytest.approx(original["until"] / published, abs=2 / epochs + 0.1)
    assert 1 <= rounds(preset) <= rounds(original)
    total = original["per_round"] * rounds(original)
    assert preset["per_round"] * rounds(preset) == pytest.approx(total, abs=rounds(preset) / 2)


def test_other_names_and_too_few_epochs_are_refused():
    with pytest.raises(ValueError, match="preset among vgg16_cifar10"):
        singe.gradual_preset("resnet20")
    with pytest.raises(ValueError, match="epochs >= 2"):
        singe.gradual_preset("resnet110_cifar", 1)
    with pytest.raises(TypeError, match="int for epochs"):
        singe.gradual_preset("resnet110_cifar", 40.0)
