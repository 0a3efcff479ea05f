"""The proof that the judge is honest: the whole policy, search to verdict, on studies whose truth is known.

The synthetic `train` has a score that is a parabola in log2(lr), plus a noise of one point; it stops training three
octaves above its optimum and diverges four above. The noise belongs to the seed, or, which makes the choice of a rate
harder and copies more different, is drawn anew at every rate. docs/judge.md has the numbers of longer runs.
"""

import math
import random
from functools import cache
from statistics import fmean

import pytest

from normwise.tuning.judge import judge
from normwise.tuning.records import Record, Settings
from normwise.tuning.search import confirmation_scores, next_requests

STUDIES = 200
BEST_SCORE, BEST_OCTAVE, CHANCE = 95.0, -1.0, math.log(10)
PLANTED = "copy2"
SETTINGS = Settings("synthetic", "", tuple((f"copy{i}", "batch") for i in range(5)), steps=None, own_loop=True)


def train(study, request, advantage, curvature, anew):
    octaves = math.log2(request.lr) - BEST_OCTAVE
    if octaves > 4:
        return Record(request, "diverged", first_loss=CHANCE)
    if octaves > 3:
        return Record(request, "stuck", 10.0, first_loss=CHANCE, tail_loss=CHANCE)
    noise = random.Random(f"{study} {request.seed} {request.lr if anew else None}").gauss(0, 1)
    score = BEST_SCORE + advantage - curvature * octaves**2
    loss = CHANCE * min(0.1 + (BEST_SCORE - score) / 100, 1)
    return Record(request, "trains", score + noise, first_loss=CHANCE, tail_loss=max(loss, 0.0))


def verdict(study, curvature, *, anew, advantage=0.0, settings=SETTINGS):
    """The verdict on five copies of one normalization; the planted one may have an advantage, in points."""
    records = []
    while requests := next_requests(settings, records, chance=CHANCE):
        records += [train(study, r, advantage if r.norm == PLANTED else 0.0, curvature, anew) for r in requests]
    return judge(confirmation_scores(settings, records, CHANCE), direction="max", margin=settings.margin)


@cache
def null_studies(curvature):
    return [verdict(study, curvature, anew=True) for study in range(STUDIES)]


@cache
def planted_studies():
    return [verdict(study, 0.5, anew=False, advantage=2.0) for study in range(STUDIES)]


def says_better(found):
    return any(pair.verdict == "better" for pair in found.comparisons)


@pytest.mark.parametrize("curvature", [0.5, 4.0])  # points lost an octave from the optimum
def test_five_identical_normalizations_are_rarely_called_different(curvature):
    assert fmean(map(says_better, null_studies(curvature))) <= 0.05


def test_a_planted_difference_of_two_points_is_found():
    """Found: the planted one is the winner, and better than every other."""
    found = [v.winner == PLANTED and v.kind == "better" for v in planted_studies()]
    assert fmean(found) >= 0.80


def test_no_copy_is_called_better_than_the_planted_one():
    pairs = [pair for v in planted_studies() for pair in v.comparisons if pair.verdict == "better"]
    assert not [pair for pair in pairs if pair.other == PLANTED]
    assert fmean(pair.better == PLANTED for pair in pairs) >= 0.99


def test_identical_normalizations_are_not_called_a_tie_without_proof():
    """Ten seeds with a noise of one point cannot prove equivalence within one point: the judge must not say so."""
    kinds = [v.kind for v in null_studies(0.5)]
    assert fmean(kind == "undecided" for kind in kinds) >= 0.95
    assert all(pair.more_seeds for v in null_studies(0.5) for pair in v.comparisons if pair.verdict == "undecided")
