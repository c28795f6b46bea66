"""sampling/draw.py: the random numbers of a seed are EDM's, batches, pixels."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from denoisers import GaussianDenoiser, reference_draws

from sampling import draw, edm

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / 'tests' / 'data' / 'edm_samplers.json').read_text())


def test_golden_random_numbers():
    golden = GOLDEN['stacked_generator_cpu']
    rnd = draw.StackedRandomGenerator('cpu', golden['seeds'])
    latents = rnd.randn([3, 3, 8, 8])
    assert latents.dtype == torch.float32
    np.testing.assert_allclose(latents.flatten(1)[:, :3], golden['randn_f32_[3,8,8]_first3'], atol=1e-7, rtol=0)
    assert rnd.randint(10, size=[3]).tolist() == golden['then_randint10']
    noise = rnd.randn_like(latents.double())
    assert noise.dtype == torch.float64
    np.testing.assert_allclose(noise.flatten(1)[:, :3], golden['then_randn_like_f64_first3'], atol=1e-7, rtol=0)


def test_seeds_wrap_at_32_bits_and_rows_are_counted():
    rnd = draw.StackedRandomGenerator('cpu', [5, 2**32 + 5])
    a, b = rnd.randn([2, 4])
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match='3 rows asked of 2'):
        rnd.randn([3, 4])


@pytest.mark.parametrize('label_dim', [0, 3])
@pytest.mark.parametrize('S_churn', [0, 40])
def test_db_draws_are_those_of_edm(label_dim, S_churn):
    class Net(GaussianDenoiser):
        img_channels, img_resolution = 1, 4

    net = Net()
    net.label_dim = label_dim
    drawn = []

    def sampler(net, latents, labels, randn_like):
        def spy(x):
            drawn.append(randn_like(x))
            return drawn[-1]

        drawn.extend([latents, labels])
        return edm.edm_sampler(net, latents, labels, spy, num_steps=18, S_churn=S_churn)

    list(draw.generate_images(net, [[7, 9]], sampler, torch.device('cpu')))
    latents, labels, *noises = drawn
    assert len(noises) == 18
    assert latents.dtype == torch.float32
    assert all(noise.dtype == torch.float64 for noise in noises)
    for row, seed in enumerate([7, 9]):
        latent, class_idx, expected = reference_draws(seed, [1, 4, 4], label_dim, 18)
        assert torch.equal(latents[row], latent)
        assert labels is None if class_idx is None else labels[row].tolist() == torch.eye(3)[class_idx].tolist()
        assert all(torch.equal(noise[row], value) for noise, value in zip(noises, expected, strict=True))


def test_class_option_replaces_the_class_and_keeps_the_noise(digits):
    seen = []

    def sampler(net, latents, labels, randn_like):
        seen.append((latents, labels, randn_like(latents)))
        return latents

    for class_idx in (None, 2):
        list(draw.generate_images(digits, [[0, 1, 2, 3]], sampler, torch.device('cpu'), class_idx))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][2], seen[1][2])
    assert seen[1][1].tolist() == [[0, 0, 1]] * 4
    assert seen[0][1].argmax(1).tolist() == [reference_draws(s, [1, 8, 8], 3, 0)[1] for s in range(4)]


def test_to_uint8_truncates_as_edm_does():
    values = [-9, -1, -0.999, -0.5, 0, 0.5, 0.99, 0.996, 1, 9]
    images = torch.tensor(values, dtype=torch.float64).reshape(1, 1, 2, 5)
    assert draw.to_uint8(images).flatten().tolist() == [0, 0, 0, 64, 128, 191, 254, 254, 255, 255]
    assert draw.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_batches_are_few_and_nearly_equal():
    assert draw.split_seeds(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert draw.split_seeds([5, 5, 1], 64) == [[5, 5, 1]]
    assert draw.split_seeds([10**25], 64) == [[10**25]]


def test_the_seed_of_an_image_that_is_not_finite_is_named():
    class Net(GaussianDenoiser):
        img_channels, img_resolution, label_dim = 1, 4, 0

        def __call__(self, x, sigma, class_labels=None):
            D = super().__call__(x, sigma)
            D[2] = math.nan
            return D

    with pytest.raises(ValueError, match=r'seed 9: image 2 of the batch is not finite after step 1 of 18'):
        list(draw.generate_images(Net(), [[5, 7, 9]], edm.edm_sampler, torch.device('cpu')))


def test_a_process_without_seeds_draws_nothing():
    rnd = draw.StackedRandomGenerator('cpu', [])
    assert rnd.randn([0, 3, 2]).shape == (0, 3, 2)
    assert rnd.randint(10, size=[0]).dtype == torch.int64
