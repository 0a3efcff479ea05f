import math
from dataclasses import replace

import pytest

from normwise.tuning.outcomes import best_rate, diverge_edge, sensitivity, standing, train_edges, trains
from normwise.tuning.records import Edge, Record, Request

CHANCE = 2.0


def trial(lr, seed=0, score=50.0, loss=0.1, outcome="trains", first=2.0):
    return Record(Request("select", "batch", lr, seed, 100), outcome, score, first, loss, loss)


def diverged(lr, seed=0, first=2.0):
    return Record(Request("select", "batch", lr, seed, 100), "diverged", first_loss=first)


def by_rate(*rows):
    return {row[0].request.lr: tuple(row) for row in rows}


# ---------------------------------------------------------------------------------------------------------- trains


@pytest.mark.parametrize(("loss", "share", "expected"), [(0.99, 0.5, True), (1.0, 0.5, False), (1.0, 0.9, True)])
def test_both_losses_must_be_below_the_share_of_chance(loss, share, expected):
    low = trial(1.0, loss=0.0)
    assert trains(replace(low, tail_loss=loss), share, CHANCE) is expected
    assert trains(replace(low, val_loss=loss), share, CHANCE) is expected


def test_a_loss_that_does_not_exist_does_not_train():
    assert not trains(replace(trial(1.0), val_loss=None), 0.9, CHANCE)
    assert trains(replace(trial(1.0), val_loss=None), 0.9, CHANCE, own_loop=True)
    assert not trains(replace(trial(1.0, loss=1.9), val_loss=None), 0.9, CHANCE, own_loop=True)


def test_without_losses_the_outcome_counts():
    silent = Record(Request("select", "batch", 1.0, 0, None), "trains", 50.0)
    assert trains(silent, 0.25, CHANCE, own_loop=True)
    assert trains(silent, 0.25, None)
    assert not trains(replace(silent, outcome="diverged", score=None), 0.25, None)


def test_what_diverged_does_not_train_however_low_its_losses():
    assert not trains(trial(1.0, loss=0.0, outcome="diverged"), 0.9, CHANCE)


# ------------------------------------------------------------------------------------------------------- best rate


def test_the_best_rate_has_the_best_mean_score():
    trials = by_rate([trial(1.0, 0, 90.0), trial(1.0, 1, 70.0)], [trial(4.0, 0, 81.0), trial(4.0, 1, 81.0)])
    assert best_rate(trials, "max") == 4.0
    assert best_rate(trials, "min") == 1.0


def test_scores_are_smoothed_over_half_an_octave_on_either_side():
    root = math.sqrt(2)
    scores = {0.25: 80.0, 0.25 * root: 84.0, 0.5: 80.0, 0.5 * root: 83.0, 1.0: 83.0, root: 83.0, 2.0: 80.0}
    trials = by_rate(*([trial(lr, score=score)] for lr, score in scores.items()))
    assert best_rate(trials, "max") == 1.0  # 83 among 83s, not the lone 84 among 80s
    far = by_rate(*([trial(lr**4, score=score)] for lr, score in scores.items()))
    assert best_rate(far, "max") == (0.25 * root) ** 4  # two octaves apart nothing is smoothed


def test_a_rate_where_a_seed_failed_loses_to_one_where_none_did():
    trials = by_rate([trial(1.0, 0, 50.0), trial(1.0, 1, 50.0)], [trial(4.0, 0, 99.0), diverged(4.0, 1)])
    assert best_rate(trials, "max") == 1.0
    only = by_rate([diverged(1.0, 0), diverged(1.0, 1)], [trial(4.0, 0, 20.0), diverged(4.0, 1)])
    assert best_rate(only, "max") == 4.0
    assert best_rate(by_rate([diverged(1.0)], [diverged(4.0)]), "max") is None
    assert best_rate({}, "max") is None


def test_ties_go_to_the_lower_validation_loss_then_to_the_smaller_rate():
    trials = by_rate([trial(1.0, loss=0.3)], [trial(4.0, loss=0.2)], [trial(16.0, loss=0.2)])
    assert best_rate(trials, "max") == 4.0
    assert best_rate(trials, "min") == 4.0


# ----------------------------------------------------------------------------------------------------------- edges


def test_edges_are_geometric_means_with_the_range_of_the_seeds():
    stuck = {"loss": 1.95, "outcome": "stuck"}
    trials = by_rate(
        [trial(1.0, 0), trial(1.0, 1)],
        [trial(4.0, 0, **stuck), trial(4.0, 1)],
        [trial(16.0, 0, **stuck), trial(16.0, 1)],
        [diverged(64.0, 0), trial(64.0, 1, **stuck)],
    )
    edges = train_edges(trials, CHANCE)
    assert edges["0.5"] == Edge(4.0, 1.0, 16.0, seeds=2)
    assert diverge_edge(trials) == Edge(64.0, 64.0, 64.0, seeds=2, censored=1)


def test_thresholds_order_the_edges():
    trials = by_rate([trial(1.0, loss=0.4)], [trial(4.0, loss=0.9)], [trial(16.0, loss=1.7)], [trial(64.0, loss=1.9)])
    assert {share: edge.mean for share, edge in train_edges(trials, CHANCE).items()} == {
        "0.9": 16.0,
        "0.5": 4.0,
        "0.25": 1.0,
    }


def test_the_training_edge_looks_past_a_failure_and_the_divergence_edge_does_not():
    trials = by_rate([trial(1.0)], [diverged(4.0)], [trial(16.0)], [diverged(64.0)])
    assert train_edges(trials, CHANCE)["0.5"].mean == 16.0
    assert diverge_edge(trials).mean == 4.0


def test_an_edge_beyond_the_rates_tried_is_censored_and_one_that_is_not_there_is_none():
    trials = by_rate([trial(1.0, 0), trial(1.0, 1, loss=1.95)], [trial(4.0, 0), trial(4.0, 1, loss=1.95)])
    assert train_edges(trials, CHANCE)["0.5"] == Edge(4.0, 4.0, 4.0, seeds=1, censored=1)
    nowhere = by_rate([trial(1.0, loss=1.95)])
    assert train_edges(nowhere, CHANCE)["0.5"] == Edge(None, None, None, seeds=0)
    assert diverge_edge({}) == Edge(None, None, None, seeds=0)


# ----------------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_is_the_mean_excess_loss_over_the_declared_range():
    trials = by_rate(
        [trial(1.0, loss=1.5)],  # 1.5
        [trial(2.0, loss=0.1)],  # the best, between the declared rates
        [trial(4.0, loss=0.5)],  # 0.5
        [trial(16.0, loss=7.0)],  # no worse than the first loss, 2
        [diverged(64.0, first=None)],  # counts at its seed's first loss, 2
        [trial(256.0, loss=0.2)],  # outside
    )
    assert sensitivity(trials, (1.0, 4.0, 16.0, 64.0)) == pytest.approx((1.5 + 0.5 + 2 + 2) / 4 - 0.1)


def test_sensitivity_averages_over_seeds_before_it_looks_for_the_best():
    trials = by_rate(
        [trial(1.0, 0, loss=0.0), trial(1.0, 1, loss=1.0)], [trial(4.0, 0, loss=0.4), trial(4.0, 1, loss=0.4)]
    )
    assert sensitivity(trials, (1.0, 4.0)) == pytest.approx(0.45 - 0.4)


def test_sensitivity_of_a_users_loop_reads_the_tail_of_its_losses():
    rows = [replace(trial(lr, loss=loss), val_loss=None) for lr, loss in ((1.0, 0.7), (4.0, 0.1))]
    assert sensitivity(by_rate(*([row] for row in rows)), (1.0, 4.0)) == pytest.approx(0.3)


def test_without_losses_there_is_no_sensitivity():
    silent = replace(trial(1.0, first=None), tail_loss=None, val_loss=None)
    assert sensitivity(by_rate([silent]), (1.0,)) is None
    assert sensitivity({}, (1.0,)) is None


# -------------------------------------------------------------------------------------------------------- standing


def test_of_two_grids_the_one_with_fewer_failures_stands_higher_then_the_better_score():
    good = by_rate([trial(1.0, 0, 90.0), trial(1.0, 1, 90.0)])
    failing = by_rate([trial(1.0, 0, 99.0), diverged(1.0, 1)])
    better = by_rate([trial(1.0, 0, 91.0), trial(1.0, 1, 91.0)])
    assert standing(better, "max")[:-1] > standing(good, "max")[:-1] > standing(failing, "max")[:-1]
    assert standing(good, "min")[:-1] > standing(better, "min")[:-1]
    assert standing(good, "max") == (2, 90.0, -0.1, 1.0)
    assert standing(by_rate([diverged(1.0)]), "max") is None


def test_equal_scores_are_told_apart_by_their_loss():
    low, high = (by_rate([trial(1.0, 0, 90.0, loss=loss)]) for loss in (0.1, 0.2))
    assert standing(low, "max")[:-1] > standing(high, "max")[:-1]
