import json
import math
from dataclasses import replace
from statistics import fmean

import pytest

from normwise.tuning.records import (
    ActivationPoint,
    Edge,
    GapPoint,
    Horizon,
    Measures,
    Record,
    Settings,
    SharpnessPoint,
    SmoothnessPoint,
    VariantSummary,
)
from normwise.tuning.search import next_requests, selection
from normwise.tuning.summary import rows, summarize, summary_from_dict

CHANCE = math.log(10)
NORMS = (("batch", "batch"), ("none", "none"), ("mine", "[n] c [...]"))
SETTINGS = Settings("mlp", "digits", NORMS, seeds=2, confirm=4, steps=100)
LIFT = {"batch": 0.0, "none": -6.0, "mine": -3.0}


def network(request):
    """A network with its best rate at 2**-1, a training edge at 2**2 and divergence from 2**4; small seed noise."""
    octave = math.log2(request.lr)
    if octave >= 4:
        return Record(request, "diverged", first_loss=2.4)
    if octave > 2:
        return Record(request, "stuck", 10.0, 2.4, tail_loss=2.3, val_loss=2.3)
    score = 95 - (octave + 1) ** 2 / 4 + LIFT[request.norm] + 0.1 * (request.seed % 2)
    loss = 0.1 + (octave + 1) ** 2 / 50
    test = None if request.phase == "select" else loss
    return Record(request, "trains", score, 2.4, loss, loss, test, weight_norm=10.0 + request.seed % 4)


def study(trial=network, settings=SETTINGS, chance=CHANCE):
    records = []
    while requests := next_requests(settings, records, chance=chance):
        records += [trial(request) for request in requests]
    return records


def summary(trial=network, settings=SETTINGS, chance=CHANCE):
    labels = [label for label, _ in settings.norms]
    return summarize(
        settings,
        study(trial, settings, chance),
        chance=chance,
        facts={"data": "made up"},
        described={label: f"layer of {label}" for label in labels},
        parameters=dict.fromkeys(labels, 1234),
        ms_per_step={"batch": 2.5, "none": None},
        reproduce={"command": "normwise tune"},
        seconds=12.0,
    )


# ---------------------------------------------------------------------------------------------------------- numbers


def test_a_normalization_is_condensed():
    whole = summary()
    batch = whole.norms[0]
    assert (batch.label, batch.declaration, batch.described) == ("batch", "batch", "layer of batch")
    assert batch.lr_best == 0.5
    assert batch.lr_train["0.5"] == Edge(4.0, 4.0, 4.0, seeds=2)
    assert batch.lr_diverge == Edge(16.0, 16.0, 16.0, seeds=2)
    assert batch.margin_octaves == 3.0
    assert batch.scores == (95.0, 95.1, 95.0, 95.1)
    assert (batch.mean, batch.median) == pytest.approx((95.05, 95.05))
    assert (batch.low, batch.high) == pytest.approx((95.05 - 3.182 * 0.0577 / 2, 95.05 + 3.182 * 0.0577 / 2), abs=1e-3)
    assert batch.weight_norm == 11.5
    assert (batch.failures, batch.ms_per_step, batch.parameters) == (0, 2.5, 1234)
    assert (len(batch.confirmation), len(batch.horizon)) == (4, 4)
    assert batch.trials == len(batch.selection) + 8
    assert whole.trials == sum(norm.trials for norm in whole.norms)
    assert whole.lr_range == (2**-8, 4.0)


def test_the_sensitivity_is_over_the_declared_range():
    octaves = (-8, -6, -4, -2, 0)
    losses = [0.1 + (octave + 1) ** 2 / 50 for octave in octaves] + [0.1 + 9 / 50]
    assert summary().norms[0].sensitivity == pytest.approx(fmean(losses) - 0.1)


def test_selection_is_in_order_of_rate_and_seed():
    asked = [(r.request.lr, r.request.seed) for r in summary().norms[1].selection]
    assert asked == sorted(asked)


def test_the_verdict_names_the_rates():
    verdict = summary().verdict
    assert (verdict.winner, verdict.runner_up, verdict.kind) == ("batch", "mine", "better")
    assert verdict.sentence.startswith("Use batch at learning rate 0.5: 95.05 % on average over 4 seeds, better than")


def test_among_equals_the_one_that_does_not_depend_on_the_batch_is_recommended():
    def alike(request):
        record = network(request)
        return record if record.outcome != "trains" else replace(record, score=record.score - LIFT[request.norm])

    norms = (("batch", "batch"), ("mine", "[n] c [...]"), ("none", "none"))
    assert summary(alike, replace(SETTINGS, norms=norms)).verdict.recommended == "none"


def test_the_horizon_compares_the_leads():
    horizon = summary().horizon
    assert (horizon.winner, horizon.runner_up, horizon.steps, horizon.reversed) == ("batch", "mine", 100, False)
    assert (horizon.lead, horizon.lead_doubled) == pytest.approx((3.0, 3.0))


def test_json_and_back():
    whole = summary()
    data = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert summary_from_dict(data) == whole
    alone = summary(settings=replace(SETTINGS, norms=NORMS[:1], lrs=(0.1, 0.5)))
    assert alone.horizon is None
    assert summary_from_dict(json.loads(json.dumps(alone.to_dict()))) == alone
    with pytest.raises(KeyError):
        summary_from_dict({})


def test_measures_and_combinations_in_json_and_back():
    whole = summary()
    edge = Edge(1.0, 0.5, 2.0, 2)
    measures = Measures(
        seed=3,
        smoothness=(SmoothnessPoint(0, 0.1, 0.2, 0.3, 4.0, 5.0), SmoothnessPoint(10, None, None, None, None, None)),
        sharpness=(SharpnessPoint(0, 10.0, -1.0, 2.0, 4.0),),
        activations=(ActivationPoint("0.norm", 1.0, 2.0),),
        gap=GapPoint(1.0, 0.9, None),
        saved_bytes=1024,
    )
    variant = (("batch_size", 8), ("optimizer", "sgd"))
    norm = replace(
        whole.norms[0],
        variant=variant,
        variants=(VariantSummary(variant, 0.5, 91.0, edge), VariantSummary(variant, None, None, None)),
        control={"0.5": edge},
        control_diverge=edge,
        measures=measures,
    )
    grown = replace(whole, norms=(norm, *whole.norms[1:]))
    assert summary_from_dict(json.loads(json.dumps(grown.to_dict()))) == grown
    assert grown.version == 2


def test_rows_are_a_heading_and_a_line_a_normalization():
    head, batch, none, mine = rows(summary())
    assert head == (
        "normalization", "score", "median", "lr_best", "lr_train", "lr_diverge",
        "margin", "sensitivity", "failures", "ms/step", "parameters",
    )  # fmt: skip
    assert batch == ("batch", "95.05 %", "95.05 %", "0.5", "4", "16", "3.0 oct", "0.313", "0/4", "2.50", "1,234")
    assert none[:2] == ("none", "89.05 %")
    assert mine[-2:] == ("-", "1,234")


def test_rows_say_what_lies_beyond_the_rates_tried():
    def calm(request):
        record = network(request)
        if record.outcome != "diverged" or request.seed % 2:
            return record
        return replace(record, outcome="stuck", score=10.0, tail_loss=2.3, val_loss=2.3)

    assert rows(summary(calm))[1][5] == "at least 256"
    hardy = rows(summary(lambda r: replace(network(replace(r, lr=0.5)), request=r), replace(SETTINGS, lrs=(0.1, 0.5))))
    assert hardy[1][4:6] == ("at least 0.5", "none up to 0.5")


# --------------------------------------------------------------------------------------------------------- warnings


def test_a_clean_study_warns_of_nothing():
    assert summary().warnings == ()


def test_a_reversal_comes_first():
    def turning(request):
        record = network(request)
        swap = request.phase == "horizon" and request.norm == "batch"
        return replace(record, score=record.score - 8.0) if swap else record

    whole = summary(turning, replace(SETTINGS, lrs=(0.1, 0.5)))
    assert whole.horizon == Horizon("batch", "mine", 100, pytest.approx(3.0), pytest.approx(-5.0), reversed=True)
    assert whole.warnings[0] == (
        "reversal: batch leads mine by 3.00 points at 100 steps, but mine leads by 5.00 points at 200. "
        "Judge again with the number of steps that you will train for"
    )


def test_a_turn_within_the_noise_is_no_reversal():
    def noisy(request):
        record = network(request)
        return (
            replace(record, score=record.score - 3.05)
            if request.phase == "horizon" and request.norm == "batch"
            else record
        )

    horizon = summary(noisy).horizon
    assert horizon.lead_doubled < 0
    assert not horizon.reversed


def test_a_best_rate_and_an_edge_at_the_end_of_a_fixed_grid():
    whole = summary(settings=replace(SETTINGS, norms=NORMS[:1], lrs=(0.1, 0.5)))
    assert whole.warnings == (
        "boundary: the best learning rate of batch, 0.5, is the largest one tried, so a better one may lie beyond; "
        "widen --lrs",
        "boundary: batch still trains at 0.5, the largest learning rate tried, for 2 of 2 seeds, so its lr_train is a "
        "lower bound; widen --lrs",
    )
    small = summary(settings=replace(SETTINGS, norms=NORMS[:1], lrs=(0.5, 8.0)))
    assert small.warnings[0].startswith("boundary: the best learning rate of batch, 0.5, is the smallest one tried")


def test_undecided_pairs_say_how_many_seeds_would_decide():
    def close(request):
        record = network(request)
        wide = request.phase == "confirm" and request.norm == "mine"
        return replace(record, score=94.4 + 1.0 * (request.seed % 2)) if wide else record

    whole = summary(close)
    pair = next(c for c in whole.verdict.comparisons if {c.better, c.other} == {"batch", "mine"})
    assert pair.verdict == "undecided"
    assert f"undecided: batch against mine; about {pair.more_seeds} more seeds would decide" in whole.warnings


def test_failed_confirmation_seeds_are_imputed_and_said():
    def fragile(request):
        if request.phase == "confirm" and request.norm == "none" and request.seed % 4 == 0:
            return Record(request, "diverged", first_loss=2.4)
        return network(request)

    whole = summary(fragile)
    none = whole.norms[1]
    assert none.failures == 1
    assert none.scores == pytest.approx((10.0, 89.1, 89.0, 89.1))
    assert whole.warnings[-1] == (
        "failures: 1 of 4 seeds of none did not train; 1 diverged and count as 10.00 %, the worst score or chance level"
    )


def test_a_normalization_that_always_diverges_is_reported_without_a_verdict():
    def hopeless(request):
        return Record(request, "diverged", first_loss=2.4) if request.norm == "none" else network(request)

    whole = summary(hopeless)
    assert (whole.norms[1].lr_best, whole.norms[1].mean, whole.norms[1].scores) == (None, None, ())
    assert "no rate: every selection trial of none diverged; it was not confirmed" in whole.warnings
    assert {c.other for c in whole.verdict.comparisons} == {"mine"}
    nothing = summary(lambda r: Record(r, "diverged", first_loss=2.4))
    assert nothing.verdict.sentence == (
        "No normalization can be recommended: every trial of the learning-rate search diverged."
    )
    assert rows(nothing)[1][1:5] == ("-", "-", "-", "-")


def silent(request):
    """A user's loop that returns fractions and logs no losses."""
    record = network(request)
    score = None if record.score is None else record.score / 100
    return Record(request, "diverged" if score is None else "trains", score)


def test_fractions_where_percent_are_meant_are_the_loudest_warning():
    own = replace(SETTINGS, own_loop=True, steps=None)
    whole = summary(silent, own, chance=None)
    assert whole.warnings[0] == (
        "scores look like fractions: all lie between 0 and 1, while the margin of 0.5 is in points of percent. "
        "The verdict cannot be trusted: return 100 times the score, or give a margin that fits"
    )
    for harmless in (replace(own, unit=""), replace(own, margin=0.01)):
        assert not any("fractions" in warning for warning in summary(silent, harmless, chance=None).warnings)


def test_without_losses_there_are_no_training_edges():
    norm = summary(silent, replace(SETTINGS, own_loop=True, steps=None), chance=None).norms[0]
    assert (norm.lr_train, norm.margin_octaves, norm.sensitivity) == ({}, None, None)
    assert norm.lr_diverge.mean == 16.0


def test_the_summary_reads_what_the_search_ran():
    records = study()
    assert set(selection(SETTINGS, records, "batch")) == {r.request.lr for r in summary().norms[0].selection}
