import math

import numpy as np
import pytest
from scipy import stats

from normwise.errors import StudyError
from normwise.tuning.judge import judge, quantile

BATCH = [97.9, 98.1, 97.8, 98.3, 97.9]
LAYER = [95.6, 96.1, 95.9, 95.8, 96.2]
NONE = [90.2, 91.0, 90.4, 91.2, 90.7]
RATES = {"batch": 0.5, "layer": 0.25, "none": 2**-4}


def pair(verdict, better, other):
    return next(c for c in verdict.comparisons if (c.better, c.other) == (better, other))


def spread(mean, width, count):
    """Scores with exactly this mean and this standard deviation."""
    raw = np.linspace(-1, 1, count)
    return list(mean + width * raw / raw.std(ddof=1))


def test_intervals_are_games_howell():
    scores = {"a": spread(10, 1.0, 8), "b": spread(8, 3.0, 5), "c": spread(7, 0.5, 12)}
    verdict = judge(scores, direction="max", margin=100.0)
    for c in verdict.comparisons:
        a, b = np.array(scores[c.better]), np.array(scores[c.other])
        u, v = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
        df = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
        half = stats.studentized_range.ppf(0.95, 3, df) * math.sqrt((u + v) / 2)
        assert c.difference == pytest.approx(a.mean() - b.mean())
        assert (c.high - c.low) / 2 == pytest.approx(half, rel=2e-3)


def test_two_groups_give_welchs_t_interval():
    a, b = spread(10, 1.0, 8), spread(8, 3.0, 5)
    c = judge({"a": a, "b": b}, direction="max", margin=50.0).comparisons[0]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (c.low, c.high) == pytest.approx((expected.low, expected.high), rel=2e-3)


@pytest.mark.parametrize("groups", [2, 5, 12])
@pytest.mark.parametrize("df", [1.0, 1.7, 4.4, 9.0, 22.0, 50.0, 300.0, 1e7])
def test_the_quantile_is_scipys(groups, df):
    tolerance = 1.2e-3 if df >= 3 else 0.03
    exact = stats.studentized_range.ppf(0.95, groups, min(df, 1e6))
    assert quantile(0.95, groups, df) == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("df", [1.2, 1.7, 2.4])
def test_the_quantile_errs_on_the_wide_side(df):
    assert quantile(0.95, 5, df) > stats.studentized_range.ppf(0.95, 5, df)


def test_the_headline_bound_makes_both_errors_sum_to_five_percent():
    a, b, margin = spread(12, 1.0, 10), spread(9, 1.0, 10), 0.5
    error = math.sqrt(0.2)
    c = judge({"a": a, "b": b, "c": spread(0, 1.0, 10)}, direction="max", margin=margin).comparisons[0]
    critical = (c.difference - c.low) / error
    wrong = stats.t.sf(critical, 18) + stats.t.sf(critical + 2 * margin / error, 18)
    assert wrong == pytest.approx(0.05, abs=1e-6)


def test_without_a_margin_the_headline_is_a_two_sided_t_test():
    scores = {"a": spread(12, 1.0, 10), "b": spread(9, 1.0, 10), "c": spread(0, 1.0, 10)}
    c = judge(scores, direction="max", margin=0.0).comparisons[0]
    assert c.low == pytest.approx(3 - stats.t.ppf(0.975, 18) * math.sqrt(0.2))


def test_the_headline_needs_every_rival_beaten():
    clear = {"a": spread(12, 1.0, 10), "b": spread(10.4, 1.0, 10), "c": spread(0, 1.0, 10)}
    assert judge(clear, direction="max", margin=0.5).kind == "better"
    close = {**clear, "d": spread(11.2, 1.0, 10)}
    verdict = judge(close, direction="max", margin=0.5)
    assert verdict.kind == "undecided"
    assert [pair(verdict, "a", o).verdict for o in "dbc"] == ["undecided", "undecided", "better"]


def test_verdicts_follow_the_margin():
    scores = {"a": spread(10.3, 0.1, 10), "b": spread(10.0, 0.1, 10)}
    assert judge(scores, direction="max", margin=0.1).kind == "better"
    assert judge(scores, direction="max", margin=0.5).kind == "equivalent"
    assert judge(scores, direction="max", margin=0.28).kind == "equivalent"  # certainly 0.2 to 0.4: inside 0.56
    wide = {label: [10 + 9 * (s - 10) for s in values] for label, values in scores.items()}
    assert judge(wide, direction="max", margin=0.5).kind != "equivalent"


def test_differences_favour_the_first_whichever_way_the_metric_runs():
    scores = {"a": [1.0, 1.1, 0.9], "b": [3.0, 3.1, 2.9]}
    up, down = (judge(scores, direction=d, margin=0.1, unit="nats") for d in ("max", "min"))
    assert (up.winner, down.winner) == ("b", "a")
    assert up.comparisons[0].difference == pytest.approx(2.0) == down.comparisons[0].difference
    assert up.comparisons[0].low == pytest.approx(down.comparisons[0].low)


def test_constant_scores_have_intervals_of_no_width():
    verdict = judge({"a": [100.0] * 4, "b": [99.0] * 4, "c": [99.9] * 4}, direction="max", margin=0.5)
    assert (pair(verdict, "a", "b").low, pair(verdict, "a", "b").high) == (1.0, 1.0)
    assert pair(verdict, "a", "b").verdict == "better"
    assert pair(verdict, "a", "c").verdict == "equivalent"
    assert judge({"a": [5.0, 5.0], "b": [5.0, 5.0]}, direction="max", margin=0.0).kind == "equivalent"


def test_a_single_seed_decides_nothing():
    verdict = judge({"a": [99.0], "b": [10.0]}, direction="max", margin=0.5)
    only = verdict.comparisons[0]
    assert (only.verdict, only.low, only.high, only.more_seeds) == ("undecided", -math.inf, math.inf, None)
    assert "a single seed has no interval, so run at least 2, better 10" in verdict.sentence


def test_so_many_more_seeds_decide_and_one_fewer_does_not():
    scores = {"a": spread(10.9, 1.0, 10), "b": spread(10.0, 1.0, 10)}
    more = judge(scores, direction="max", margin=0.5).comparisons[0].more_seeds
    assert more is not None
    for seeds, kind in ((10 + more, "better"), (10 + more - 1, "undecided")):
        repeated = {label: spread(np.mean(values), 1.0, seeds) for label, values in scores.items()}
        assert judge(repeated, direction="max", margin=0.5).kind == kind


def test_no_number_of_seeds_is_named_where_none_would_do():
    scores = {"a": spread(10.0, 1.0, 5), "b": spread(10.0, 1.0, 5)}
    verdict = judge(scores, direction="max", margin=0.0)
    assert verdict.comparisons[0].more_seeds is None
    assert "even 1000 more seeds would not decide" in verdict.sentence


def test_among_equivalents_the_simplest_is_recommended_even_if_it_is_not_the_best():
    scores = {"batch": spread(97.9, 0.2, 8), "rms": spread(97.6, 0.2, 8), "layer": spread(97.7, 0.2, 8)}
    order = {"rms": 0, "layer": 1, "batch": 2}
    for simplicity in (order, order.__getitem__):
        verdict = judge(scores, direction="max", margin=0.5, simplicity=simplicity)
        assert (verdict.winner, verdict.recommended, verdict.kind) == ("batch", "rms", "equivalent")
    far = {**scores, "none": spread(90.0, 0.2, 8)}
    assert judge(far, direction="max", margin=0.5, simplicity={**order, "none": -1}).recommended == "rms"


def test_equal_means_keep_the_order_given():
    assert judge({"b": [1.0, 2.0], "a": [2.0, 1.0]}, direction="max", margin=0.5).winner == "b"


def test_the_sentence_when_one_is_better():
    scores = {"batch": BATCH, "layer": LAYER, "none": NONE}
    assert judge(scores, direction="max", margin=0.5, rates=RATES).sentence == (
        "Use batch at learning rate 0.5: 98.00 % on average over 5 seeds, better than every other normalization by at "
        "least 1.82 points (95 % confidence, margin 0.50 points); the runner-up, layer at learning rate 0.25, is "
        "2.08 points behind."
    )


def test_the_sentence_when_the_winner_has_a_simpler_equivalent():
    scores = {"batch": BATCH, "layer": [s - 0.1 for s in BATCH], "none": NONE}
    verdict = judge(scores, direction="max", margin=0.5, rates=RATES, simplicity={"batch": 2, "layer": 1, "none": 0})
    assert verdict.sentence == (
        "Use layer at learning rate 0.25: 97.90 %, equivalent to the best mean and simpler; batch at learning rate 0.5 "
        "reached 98.00 % on average over 5 seeds, 0.10 points ahead (95 % interval -0.26 to 0.46, inside ±1.00 points)."
    )


def test_the_sentence_when_the_winner_is_the_simplest():
    verdict = judge({"rms": BATCH, "batch": [s - 0.1 for s in BATCH]}, direction="max", margin=0.5, rates={"rms": 1.0})
    assert verdict.sentence == (
        "Use rms at learning rate 1: 98.00 % on average over 5 seeds, the best mean and the simplest of its "
        "equivalents; batch is 0.10 points behind (95 % interval -0.19 to 0.39, inside ±1.00 points). "
        "Equivalent: batch."
    )


def test_the_sentence_when_undecided():
    scores = {"batch": BATCH, "layer": [s - 0.6 for s in BATCH], "rms": [s - 0.7 for s in BATCH], "none": NONE}
    assert judge(scores, direction="max", margin=0.5, rates=RATES).sentence == (
        "Undecided: batch at learning rate 0.5 has the best mean, 98.00 % on average over 5 seeds, but its lead of "
        "0.60 points over layer at learning rate 0.25 is not settled (95 % interval 0.19 to 1.01, margin 0.50 points); "
        "nor is its lead over rms; about 2 more seeds would decide. Until then use batch at learning rate 0.5."
    )


def test_the_sentence_of_one_and_of_none():
    assert judge({"batch": BATCH}, direction="max", margin=0.5, rates=RATES).sentence == (
        "Only batch at learning rate 0.5 was confirmed: 98.00 % on average over 5 seeds, "
        "with nothing to compare it with."
    )
    nothing = judge({}, direction="max", margin=0.5)
    assert (nothing.winner, nothing.runner_up, nothing.comparisons) == ("", None, ())
    assert nothing.sentence == (
        "No normalization can be recommended: every trial of the learning-rate search diverged."
    )


def test_the_sentence_states_the_confidence_that_was_asked_for():
    scores = {"batch": BATCH, "layer": LAYER}
    sentences = [judge(scores, direction="max", margin=0.5, confidence=level).sentence for level in (0.95, 0.99)]
    assert ["(95 % confidence" in sentences[0], "(99 % confidence" in sentences[1]] == [True, True]
    bounds = [judge(scores, direction="max", margin=0.5, confidence=level).comparisons[0].low for level in (0.95, 0.99)]
    assert bounds[0] > bounds[1]


def test_numbers_show_a_tenth_of_the_margin_and_the_unit():
    scores = {"a": [0.2311, 0.2312, 0.2313], "b": [0.4311, 0.4312, 0.4313]}
    sentence = judge(scores, direction="min", margin=0.005, unit="nats").sentence
    assert "0.2312 nats on average over 3 seeds" in sentence
    assert "0.2000 nats behind" in sentence


@pytest.mark.parametrize(
    ("scores", "margin", "message"),
    [
        ({"a": [1.0]}, -0.5, "margin=-0.5: must be zero or more, in the unit of the scores"),
        ({"a": [1.0], "b": []}, 0.5, "'b' has no scores: leave it out, or impute what its failures are worth"),
        ({"a": [1.0, math.nan]}, 0.5, "'a' has the score nan: impute what a failure is worth before judging"),
    ],
)
def test_scores_that_cannot_be_judged_are_named(scores, margin, message):
    with pytest.raises(StudyError) as caught:
        judge(scores, direction="max", margin=margin)
    assert str(caught.value) == message


def test_a_failure_of_the_one_behind_does_not_hide_that_it_is_worse():
    scores = {"batch": BATCH, "none": [*NONE[:-1], 10.0]}
    alone = judge(scores, direction="max", margin=0.5)
    assert pair(alone, "batch", "none").verdict == "undecided"
    verdict = judge(scores, direction="max", margin=0.5, trained={"none": NONE[:-1]})
    found = pair(verdict, "batch", "none")
    assert found.verdict == "better"
    assert found.difference == pytest.approx(np.mean(BATCH) - np.mean(scores["none"]))
    assert found.low < np.mean(BATCH) - np.mean(NONE[:-1]) < found.difference < found.high


def test_a_failure_of_the_one_ahead_counts():
    scores = {"batch": [*BATCH[:-1], 80.0], "none": NONE}
    verdict = judge(scores, direction="max", margin=0.5, trained={"batch": BATCH[:-1], "none": NONE})
    assert pair(verdict, "batch", "none").difference == pytest.approx(np.mean(scores["batch"]) - np.mean(NONE))
    assert pair(verdict, "batch", "none").verdict == "undecided"


@pytest.mark.parametrize("failures", [8, 9, 10])
def test_what_fails_most_of_the_time_is_worse(failures):
    good = spread(95.0, 1.0, 10)
    scores = {"a": good, "b": [*good[failures:], *[10.0] * failures]}
    verdict = judge(scores, direction="max", margin=0.5, trained={"b": good[failures:]})
    assert pair(verdict, "a", "b").verdict == "better"


def test_a_pair_of_which_one_fails_now_and_then_is_not_equivalent():
    same = spread(95.0, 0.1, 10)
    whole = judge({"a": same, "b": same}, direction="max", margin=0.5)
    assert pair(whole, "a", "b").verdict == "equivalent"
    failed = judge({"a": same, "b": [*same[1:], 10.0]}, direction="max", margin=0.5, trained={"b": same[1:]})
    assert pair(failed, "a", "b").verdict == "undecided"
