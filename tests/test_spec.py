from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normwise import (
    RMS,
    Affine,
    Average,
    Frozen,
    Moving,
    PatternError,
    Scale,
    ShapeError,
    Standardize,
    TooFewSamplesError,
)
from normwise.pattern import parse
from normwise.plan import make_plan
from normwise.spec import NormSpec, check_samples

rates = st.integers(0, 1000).map(lambda n: n / 1000)
memories = st.one_of(
    st.none(),
    st.builds(lambda rate, unbiased: Moving("t c", decay=rate, unbiased=unbiased), rates, st.booleans()),
    st.builds(lambda rate: Moving("c", update_rate=rate), rates),
    st.builds(Average, st.just("(c t)"), st.booleans()),
    st.builds(Frozen, st.just("c")),
)
specs = st.builds(
    NormSpec,
    st.sampled_from(["[n] t c", "[n]  t c [...]", "[n h] t (c [k])", "[n] c t"]),
    st.one_of(st.builds(Standardize, rates), st.builds(RMS, st.one_of(st.none(), rates))),
    st.one_of(st.none(), st.sampled_from([Affine("c"), Scale("t"), Affine("(t c)")])),
    memories,
    st.dictionaries(st.sampled_from(["t", "c", "n"]), st.integers(1, 9)).map(lambda sizes: tuple(sizes.items())),
)


@given(specs)
def test_repr_is_the_code_that_makes_it_again(spec: NormSpec) -> None:
    again = eval(repr(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert repr(again) == repr(spec)


def test_a_specific_repr() -> None:
    spec = NormSpec("[n] c", Standardize(), Affine("c"), Moving("c", decay=0.9), (("c", 3),))
    assert repr(spec) == (
        "NormSpec(text='[n] c', normalizer=Standardize(eps=1e-05), recovery=Affine(over='c'), "
        "memory=Moving('c', update_rate=0.1), sizes=(('c', 3),))"
    )


def test_the_order_of_sizes_does_not_matter() -> None:
    a = NormSpec("n (g [k])", Standardize(), sizes=(("g", 2), ("k", 3)))
    assert a == NormSpec("n (g [k])", Standardize(), sizes=(("k", 3), ("g", 2)))


def test_specs_are_frozen() -> None:
    spec = NormSpec("[n] c", Standardize())
    with pytest.raises(AttributeError):
        spec.text = "n [c]"  # type: ignore[misc]


def test_fixed_and_unknown_axes() -> None:
    spec = NormSpec("[n] t c", Standardize(), Affine("c"), Moving("t c", decay=0.9), (("n", 8),))

    assert spec.unknown == ("c", "t")
    assert spec.with_sizes({"c": 3}).unknown == ("t",)
    full = spec.with_sizes({"c": 3, "t": 4})
    assert full.unknown == ()
    assert full.sizes == (("c", 3), ("n", 8), ("t", 4))
    assert spec.sizes == (("n", 8),)


def test_sizes_from_a_checkpoints_shapes() -> None:
    spec = NormSpec("[n] t (g k)", Standardize(), Affine("(g k)"), Moving("t (g k)", decay=0.9), (("g", 2),))
    assert spec.sizes_from([((("g", "k"),), (6,))]) == {"k": 3}
    assert spec.sizes_from([((("g", "k"),), (6,)), ((("t",), ("g", "k")), (5, 6))]) == {"k": 3, "t": 5}
    assert spec.sizes_from([]) == {}
    with pytest.raises(ShapeError, match="does not fit g=2 x k=3"):
        spec.sizes_from([((("g", "k"),), (6,)), ((("t",), ("g", "k")), (5, 8))])


@pytest.mark.parametrize(
    ("text", "shape", "remembers", "refused"),
    [
        ("[n] c", (1, 3), True, True),
        ("[n] c", (2, 3), True, False),
        ("[n] c [...]", (1, 3, 4), True, False),
        ("[n] c [...]", (1, 3, 1, 1), False, True),
        ("n c [...]", (8, 3, 1), False, True),
        ("n c [...]", (8, 3), False, True),
        ("n (g [k]) [...]", (8, 3, 1), False, True),
        ("n (g [k]) [...]", (8, 6, 1), False, False),
        ("... [d]", (8, 1), False, False),
        ("n [c] ...", (8, 1, 3, 3), False, False),
        ("n [c] ...", (8, 1, 3, 3), True, True),
    ],
)
def test_what_one_sample_a_column_is_refused_for(
    text: str, shape: tuple[int, ...], remembers: bool, refused: bool
) -> None:
    pattern = parse(text)
    plan = make_plan(pattern, shape, (("g", 3),) if "g" in text else ())
    if refused:
        with pytest.raises(TooFewSamplesError):
            check_samples(pattern, plan, remembers=remembers)
    else:
        check_samples(pattern, plan, remembers=remembers)


def test_parts_are_checked_against_the_pattern_at_construction() -> None:
    with pytest.raises(PatternError, match="which is not in the pattern"):
        NormSpec("[n] c", Standardize(), Affine("k"))
