"""How a run tells that its machine was noisy."""

import pytest

from benchmarks.harness.noise import Noise, measure_noise

# Middle halves of a tenth of the median less a little, and more; one outlier is no noise.
CALM, RESTLESS = [1.0, 1.03, 1.06, 1.09, 1.0, 9.0, 1.0, 1.0], [1.0, 1.2, 1.0, 1.2, 1.1]


def test_series_are_counted_by_their_middle_halves():
    assert measure_noise([CALM, RESTLESS, CALM, CALM]) == Noise(4, 1)
    # The unit has no say.
    assert measure_noise([[1e-6 * each for each in RESTLESS]]) == Noise(1, 1)


def test_few_timings_tell_nothing():
    assert measure_noise([[1.0, 2.0, 3.0, 4.0]]) == Noise(0, 0)
    assert not Noise(0, 0).is_noisy
    assert str(Noise(0, 0)) == "Nothing was timed often enough to tell whether the machine was noisy."


@pytest.mark.parametrize(("restless", "noisy"), [(0, False), (25, False), (26, True), (100, True)])
def test_more_than_a_quarter_makes_a_run_noisy(restless, noisy):
    assert Noise(100, restless).is_noisy == noisy
    assert str(Noise(1000, restless)) == (
        f"In {restless} of 1,000 series of timings, the middle half is wider than 10% of the median. "
        "More than 25% of them make a run noisy."
    )
