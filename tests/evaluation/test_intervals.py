import pytest
import torch

from mixwright.evaluation.intervals import bootstrap_mean, paired_difference, resampled_means


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        found = bootstrap_mean(torch.randn(60, generator=generator) + 0.3, resamples=400, seed=trial)
        covered += int(found.low <= 0.3 <= found.high)
    assert 0.89 <= covered / 200 <= 0.99


def test_stderr_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    found = bootstrap_mean(values)
    assert found.stderr == pytest.approx(float(values.std(correction=0)) / 20, rel=0.1)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6) and found.n == 400


def test_pairing_sees_what_noise_common_to_both_hides():
    generator = torch.Generator().manual_seed(2)
    noise = 10 * torch.randn(100, generator=generator)
    found = paired_difference(noise + 0.5, noise)
    assert found.value == pytest.approx(0.5, abs=1e-5) and found.high - found.low < 1e-4


def test_rows_share_their_draws():
    values = torch.randn(1, 30, generator=torch.Generator().manual_seed(3))
    draws = resampled_means(torch.cat([values, values + 1]), resamples=50)
    torch.testing.assert_close(draws[:, 1] - draws[:, 0], torch.ones(50, dtype=torch.float64), atol=1e-6, rtol=0)


def test_nothing_to_resample_is_an_error():
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap_mean(torch.zeros(0))
