# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests of evaluations, against scipy."""

from __future__ import annotations

import random

import pytest

from python_shim import loader

stats = pytest.importorskip("scipy.stats")


@pytest.fixture(scope="module")
def native():
    return loader.load()


def test_wilson_is_scipys(native) -> None:
    for trials in (1, 7, 20, 142, 4703):
        for hits in {0, 1, trials // 3, trials}:
            expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
            found = native.wilson_interval(hits, trials)
            assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mcnemar_is_scipys_binomial_test(native) -> None:
    for before in range(0, 30, 3):
        for after in range(0, 30, 4):
            if before + after == 0:
                continue
            expected = stats.binomtest(before, before + after, 0.5).pvalue
            assert native.exact_mcnemar(before, after) == pytest.approx(expected, rel=1e-10)


def test_holm_is_scipys_definition(native) -> None:
    rng = random.Random(3)
    for count in (1, 2, 9):
        p = [rng.random() ** 3 for _ in range(count)]
        rejected_at = native.holm(p)
        # Step down by hand: a hypothesis falls at level a as long as all smaller ones have fallen.
        for level in (0.01, 0.05, 0.2, 0.7):
            order = sorted(range(count), key=p.__getitem__)
            fallen = set()
            for rank, index in enumerate(order):
                if p[index] > level / (count - rank):
                    break
                fallen.add(index)
            assert {i for i in range(count) if rejected_at[i] <= level} == fallen


def test_the_bootstrap_agrees_with_scipys(native) -> None:
    rng = random.Random(5)
    values = [rng.gauss(0.3, 1.0) for _ in range(60)]
    mean, low, high = native.clustered_bootstrap(values, list(range(60)), 1, "test")
    expected = stats.bootstrap(
        (values,), lambda x, axis: x.mean(axis=axis), n_resamples=20000, method="percentile",
        random_state=1,
    ).confidence_interval  # fmt: skip
    assert mean == pytest.approx(sum(values) / 60)
    width = expected.high - expected.low
    # 2000 resamples place a 2.5 % point to a few percent of the interval.
    assert low == pytest.approx(expected.low, abs=0.05 * width)
    assert high == pytest.approx(expected.high, abs=0.05 * width)


def test_clusters_are_resampled_whole(native) -> None:
    values = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    _, low, high = native.clustered_bootstrap(values, [0, 0, 0, 1, 1, 1], 1, "test")
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="cluster"):
        native.clustered_bootstrap([1.0], [], 1, "test")
