import warnings

import pytest
import torch
from networks import images, randomised
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import singe
from singe import reference
from singe.models.copies import copy_of
from singe.models.weightnorm import plain_copy, weight_norms, with_weight_norms, without_weight_norms


def parametrized(module, dim=0):
    return parametrizations.weight_norm(module, dim=dim)


def hooked(module, dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, dim=dim)


def network(norm, dim=0):
    model = nn.Sequential(
        norm(nn.Conv2d(3, 6, 3), dim), nn.ReLU(), norm(nn.ConvTranspose2d(6, 5, 2), dim), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(5, 4), dim),
    )  # fmt: skip
    return randomised(model)


KINDS = [parametrized, hooked]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", KINDS)
def test_norms_come_off_and_go_back_on(norm, dim):
    model, x = network(norm, dim), images()[0]
    expected, names = model(x), set(model.state_dict())
    norms = weight_norms(model)
    assert [n.module for n in norms] == ["0", "2", "6"]
    plain = plain_copy(model)
    assert weight_norms(plain) == [] and type(plain[0]) is nn.Conv2d
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(model(x), expected, msg="the model itself is as it was")
    again = with_weight_norms(plain, norms)
    assert weight_norms(again) == norms and set(again.state_dict()) == names
    torch.testing.assert_close(again(x), expected)


@pytest.mark.parametrize("norm", KINDS)
def test_what_was_not_trained_still_is_not(norm):
    model = network(norm)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("original0" not in name and "_g" not in name)
    norms = weight_norms(model)
    assert all(n.requires_grad == (False, True) for n in norms)
    again = with_weight_norms(without_weight_norms(copy_of(model)), norms)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags


def test_a_row_of_zeros_stays_one():
    model = network(parametrized)
    plain = plain_copy(model)
    with torch.no_grad():
        plain[0].weight[2] = 0
    expected = plain(images()[0])
    torch.testing.assert_close(with_weight_norms(plain, weight_norms(model))(images()[0]), expected)


def test_other_parametrizations_are_left_alone():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
    assert weight_norms(model) == [] and parametrize.is_parametrized(plain_copy(model)[0])


@pytest.mark.parametrize("norm", KINDS)
def test_a_network_with_weight_norms_is_pruned_and_saved(norm, tmp_path):
    model, batch = network(norm), images()
    result = singe.prune(model, [batch], 0.4, allocation="uniform", finetune=None, images=4, progress=False)
    assert [n.module for n in weight_norms(result.model)] == ["0", "2", "6"]
    assert result.model[0].out_channels < 6 and result.model(batch[0]).isfinite().all()
    result.save(tmp_path)
    loaded = singe.load(network(norm), tmp_path)
    torch.testing.assert_close(loaded(batch[0]), result.model(batch[0]))


def test_scores_are_those_of_the_plain_weights():
    model, batch = network(parametrized).double(), (images()[0].double(), images()[1])
    for layer in ("0", "2"):
        found, expected = singe.score(model, batch, layer), singe.score(plain_copy(model), batch, layer)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found, reference.score(model, batch, layer))


def test_an_optimiser_cannot_follow():
    model, batch = network(parametrized), images()
    plan = singe.prune(model, [batch], 0.3, finetune=None, images=4, progress=False).plan
    with pytest.raises(ValueError, match="expected a model without weight norms"):
        plan.apply(model, torch.optim.SGD(model.parameters(), 0.1))
    assert [n.module for n in weight_norms(model)] == ["0", "2", "6"]
