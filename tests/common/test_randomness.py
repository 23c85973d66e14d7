from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.randomness import (
    CryptoStream,
    KeyedRandomness,
    SystemRandomness,
    normal,
    stream_seed,
    torch_generator,
    uniform,
)

KEY = bytes(range(32))


def test_uniforms_are_the_keystream_and_lie_inside_the_interval() -> None:
    cipher = Cipher(algorithms.ChaCha20(KEY, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(cipher.update(bytes(80)), dtype="<u8")
    expected = [((int(word) >> 11) + 0.5) / 2**53 for word in words]
    assert CryptoStream(KEY).uniform(10).tolist() == expected
    drawn = CryptoStream(KEY).uniform(1_000_000)
    assert 0 < drawn.min() < 1e-5
    assert 1 - 1e-5 < drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-6


def test_a_million_normals_are_normal_and_uncorrelated() -> None:
    drawn = CryptoStream(KEY).normal((1000, 1001)).numpy()
    assert drawn.std() == pytest.approx(1.0, rel=0.005)
    assert stats.kstest(drawn.ravel(), "norm").pvalue > 1e-6
    halves = drawn.ravel()[: 2 * (drawn.size // 2)].reshape(2, -1)
    assert abs(np.corrcoef(halves)[0, 1]) < 6 / halves.shape[1] ** 0.5
    assert np.abs(drawn).max() > 4.3


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0)])
def test_normals_have_the_asked_shape(shape: tuple[int, ...]) -> None:
    assert CryptoStream(KEY).normal(shape).shape == torch.Size(shape)


def test_a_stream_goes_on_and_repeats_by_its_key() -> None:
    stream = CryptoStream(KEY)
    first, second = stream.uniform(5), stream.uniform(5)
    assert not torch.equal(first, second)
    assert torch.equal(CryptoStream(KEY).uniform(10), torch.cat([first, second]))


def test_no_two_sites_rounds_purposes_or_seeds_share_a_stream() -> None:
    draws = {
        float(KeyedRandomness(seed, site).stream(purpose, number).uniform(1))
        for seed in (0, 1)
        for site in ("a", "b", "a1")
        for purpose in ("noise", "sampling")
        for number in (1, 2, 11)
    }
    assert len(draws) == 2 * 3 * 2 * 3
    system = SystemRandomness()
    assert len({float(system.stream("noise", 1).uniform(1)) for _ in range(100)}) == 100
    assert KeyedRandomness(0, "a").repeatable
    assert not system.repeatable


@given(st.lists(st.text(max_size=5) | st.integers(0, 99), min_size=1, max_size=4))
def test_seed_depends_on_every_part_and_its_boundaries(key: list[str | int]) -> None:
    assert stream_seed(0, "x", *key) == stream_seed(0, "x", *key)
    assert stream_seed(0, "x", *key) != stream_seed(1, "x", *key)
    assert stream_seed(0, "x", *key) != stream_seed(0, "x", *key, "")
    assert stream_seed(0, "ab", "c") != stream_seed(0, "a", "bc")
    assert stream_seed(0, "x", 1) != stream_seed(0, "x", "1")
    assert torch_generator(0, "x", *key).initial_seed() == torch_generator(0, "x", *key).initial_seed()


@pytest.mark.parametrize("shape", [(3, 32), (2, 384), (5, 7), (31, 1000), (4, 4), (2, 3)])
def test_draws_for_a_run_are_torchs_own_with_the_same_bits_on_every_cpu(shape: tuple[int, int]) -> None:
    def of(draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        return draw(torch_generator(3, "test", *shape))

    bound = 1.0 / shape[1] ** 0.5
    own = of(lambda generator: torch.zeros(shape).uniform_(-bound, bound, generator=generator))
    torch.testing.assert_close(of(lambda g: uniform(*shape, bound, g)), own, rtol=1e-6, atol=1e-7)
    if shape[0] * shape[1] >= 16:
        own = of(lambda generator: torch.zeros(shape).normal_(0.0, 0.5, generator=generator))
        torch.testing.assert_close(of(lambda g: normal(shape, 0.5, g)), own, rtol=1e-4, atol=1e-6)
    drawn = of(lambda g: normal((1000, 1001), 2.0, g)).numpy()
    assert drawn.std() == pytest.approx(2.0, rel=0.005)
    assert stats.kstest(drawn.ravel() / 2.0, "norm").pvalue > 1e-6
