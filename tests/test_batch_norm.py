"""BatchNorm over parts of a batch: what each part alone would give, and what cannot be split."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslkit.batch_norm import is_normalisation, running_statistics, split_batch_norm
from sslkit.errors import UserError


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("broken", [{"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_without_moving_averages_is_refused(broken: Any):
    with pytest.raises(UserError, match="cannot be split"):
        split_batch_norm(nn.Sequential(nn.BatchNorm1d(3, **broken)), 2, "backbone")


def test_unequal_groups_are_refused():
    network = nn.Sequential(nn.BatchNorm1d(3))
    split_batch_norm(network, 4, "backbone")
    with pytest.raises(UserError, match="11 images cannot be split into 4 equal groups"):
        network(torch.randn(11, 3))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.BatchNorm2d(4, affine=False, momentum=0.3), nn.Flatten(), nn.Linear(4 * 36, 5)),
        nn.BatchNorm1d(5, eps=1e-3),
    ).double()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    nn.init.normal_(tensor)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made


def split(plain: nn.Module, groups: int) -> nn.Module:
    made = copy.deepcopy(plain)
    split_batch_norm(made, groups, "backbone")
    return made


def buffers(module: nn.Module, suffix: str) -> list[Tensor]:
    return [tensor.clone() for name, tensor in module.named_buffers() if name.endswith(suffix)]


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_groups_are_normalised_as_if_each_were_a_batch(groups: int):
    plain, images = network(), drawn(12, 3, 8, 8).requires_grad_()
    made, same = split(plain, groups), images.detach().clone().requires_grad_()
    out = made(same)
    expected = torch.cat([copy.deepcopy(plain)(part) for part in images.chunk(groups)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

    weights = drawn(12, 5, seed=1)
    (out * weights).sum().backward()
    apart = [copy.deepcopy(plain) for _ in range(groups)]
    outs = torch.cat([part(x) for part, x in zip(apart, images.chunk(groups), strict=True)])
    (outs * weights).sum().backward()
    torch.testing.assert_close(same.grad, images.grad, rtol=1e-10, atol=1e-12)
    for name, parameter in made.named_parameters():
        summed = sum(dict(part.named_parameters())[name].grad for part in apart)  # type: ignore[misc]
        torch.testing.assert_close(parameter.grad, summed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
def test_running_statistics_take_the_mean_of_the_groups_once_a_batch(groups: int):
    plain, images = network(), drawn(12, 3, 8, 8)
    made = split(plain, groups)
    apart = []
    for part in images.chunk(groups):
        apart.append(copy.deepcopy(plain))
        apart[-1](part)
    made(images)
    for suffix in ("running_mean", "running_var"):
        means = [torch.stack(values).mean(0) for values in zip(*(buffers(a, suffix) for a in apart), strict=True)]
        torch.testing.assert_close(buffers(made, suffix), means, rtol=1e-12, atol=1e-12)
    assert [int(n) for n in buffers(made, "num_batches_tracked")] == [1, 1, 1]


def test_statistics_that_stay_are_not_kept_equal_over_processes():
    made = network()
    assert len(running_statistics(made)) == 6
    made[3].eval()
    kept = {buffer.data_ptr() for buffer in running_statistics(made)}
    assert kept == {buffer.data_ptr() for module in (made[1], made[4]) for buffer in list(module.buffers())[:2]}


def test_in_evaluation_it_is_the_plain_network():
    plain, images = network().eval(), drawn(7, 3, 8, 8)
    made = split(plain, 3)
    assert torch.equal(made(images), plain(images))
    assert torch.equal(torch.stack(buffers(made, "num_batches_tracked")), torch.zeros(3, dtype=torch.int64))


def test_state_is_that_of_the_plain_network():
    plain = network()
    made = split(plain, 2)
    assert list(made.state_dict()) == list(plain.state_dict())
    made(drawn(4, 3, 8, 8))
    plain.load_state_dict(made.state_dict())
    images = drawn(3, 3, 8, 8, seed=2)
    assert torch.equal(plain.eval()(images), made.eval()(images))


def test_a_split_network_can_be_copied():
    made = split(network(), 2)
    images = drawn(8, 3, 8, 8)
    copied = copy.deepcopy(made)
    assert torch.equal(copied(images), made(images))
    before = buffers(made, "running_mean")
    copied(images)
    assert all(map(torch.equal, buffers(made, "running_mean"), before)), "a copy has buffers of its own"


def test_channels_last_stays_channels_last():
    plain = nn.BatchNorm2d(4).double()
    images = drawn(8, 4, 5, 5)
    last = images.contiguous(memory_format=torch.channels_last)
    out = split(plain, 2)(last)
    torch.testing.assert_close(out, split(plain, 2)(images))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_autocast_inputs_keep_their_type():
    out = split(nn.BatchNorm1d(4), 2)(drawn(8, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_batch_norm_of_another_kind_is_refused_by_name():
    from timm.layers import BatchNormAct2d

    inner = nn.Sequential(nn.BatchNorm2d(3), BatchNormAct2d(3))
    with pytest.raises(UserError, match=r"^train\.batch_norm = 'split:2': backbone has a BatchNormAct2d \(stem\.1\)"):
        split_batch_norm(nn.ModuleDict({"stem": inner}), 2, "backbone")
    with pytest.raises(UserError, match="projector has a BatchNorm3d"):
        split_batch_norm(nn.Sequential(nn.BatchNorm3d(3)), 2, "projector")


def test_networks_without_batch_norm_are_left_alone():
    made = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3))
    before = [type(module) for module in made.modules()]
    split_batch_norm(made, 2, "backbone")
    assert [type(module) for module in made.modules()] == before


class Whitening(nn.Identity):
    batch_statistics = True


def test_other_layers_with_statistics_of_the_batch_are_refused():
    with pytest.raises(UserError, match=r"projector has a Whitening \(1\), which cannot be split"):
        split_batch_norm(nn.Sequential(nn.Linear(3, 3), Whitening()), 2, "projector")
    assert is_normalisation(Whitening())
    assert is_normalisation(nn.BatchNorm1d(3))
    assert not is_normalisation(nn.Linear(3, 3))
