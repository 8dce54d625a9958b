import pytest

import singe
from singe.scoring.curves import GROUPS, POINTS, recorded

FADING = singe.IntegratedGradient()


@pytest.mark.parametrize("groups", [1, 2, GROUPS, GROUPS + 1, 27, 1000])
def test_a_few_groups_are_looked_at_the_first_and_the_last_among_them(groups):
    chosen = [index for index in range(groups) if recorded(index, groups, FADING)]
    assert len(chosen) == min(groups, GROUPS) and chosen[0] == 0 and chosen[-1] == groups - 1


def test_a_path_is_followed_from_the_whole_neuron_to_an_eighth_of_it():
    assert list(POINTS) == sorted(set(POINTS)) and POINTS[0] == 1 / 8 and POINTS[-1] == 1


@pytest.mark.parametrize("criterion", [singe.Magnitude(), singe.IntegratedGradient(path="layer"), singe.LossChange()])
def test_criteria_that_fade_no_single_neurons_have_no_curves(criterion):
    assert not recorded(0, 1, criterion)
