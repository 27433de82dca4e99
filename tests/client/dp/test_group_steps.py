"""The shared branch as a function of the sums."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmosaic.client.group_session import GroupSum, mixed_gradient, shared_branch


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_the_steps_are_those_of_adam_with_a_falling_rate(seed, count):
    source = np.random.default_rng(seed)
    start, gradients = source.normal(size=5), [source.normal(size=5) for _ in range(count)]
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.95))
    for number, gradient in enumerate(gradients):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - number / 20)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    assert np.allclose(shared_branch(start, gradients, 0.03, 20), parameter.detach().numpy(), rtol=1e-9)


def test_a_round_without_a_sum_takes_no_step():
    source = np.random.default_rng(0)
    gradient = source.normal(size=5)
    alone = shared_branch(np.zeros(5), [gradient], 0.01, 10)
    assert np.array_equal(shared_branch(np.zeros(5), [gradient, None], 0.01, 10), alone)


def test_the_mix_is_of_means_and_leaves_out_groups_without_a_sum():
    first, second = GroupSum(np.array([2.0, 4.0]), 2.0), GroupSum(np.array([9.0, 0.0]), 3.0)
    assert np.allclose(mixed_gradient([first, second], [0.5, 0.5]), [2.0, 1.0])
    assert np.allclose(mixed_gradient([first, None], [0.25, 0.75]), [1.0, 2.0])
    assert mixed_gradient([None, None], [0.5, 0.5]) is None
    assert mixed_gradient([None, second], [1.0, 0.0]) is None
