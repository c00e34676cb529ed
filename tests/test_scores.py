"""Metrics of generated answers, against tables worked by hand."""

import json

from parts.scores import (
    answer_of,
    generation_metrics,
    is_empty,
    leaves,
    metric_names,
    shown_of,
)

import pytest

EMPTY, ONE, TWO = '{"persons": []}', '{"persons": ["A"]}', '{"persons": ["A", "B"]}'
# reference, prediction: hits, claimed, gold leaves
TABLE = [
    (EMPTY, EMPTY, 0, 0, 0),
    (EMPTY, "{}", 0, 0, 0),  # a missing key is empty too
    (EMPTY, ONE, 0, 1, 0),  # false positive
    (EMPTY, "none", 0, 0, 0),  # no JSON: claims no leaf, but does not say that nothing is there
    (ONE, ONE, 1, 1, 1),
    (ONE, EMPTY, 0, 0, 1),  # missed
    (ONE, "{}", 0, 0, 1),  # missing key
    (ONE, '{"persons": "A"}', 1, 1, 1),  # list indices are no part of the path
    (ONE, '{"persons": [1]}', 0, 1, 1),  # wrong type
    (ONE, '{"people": ["A"]}', 0, 1, 1),  # wrong key
    (ONE, '["A"]', 0, 1, 1),  # wrong nesting
    (TWO, '{"persons": ["B", "A"]}', 2, 2, 2),  # the order does not matter
    (TWO, '{"persons": ["A", "A"]}', 1, 2, 2),  # a leaf counts once for each time it is there
    (TWO, '{"persons": ["A", "B"', 0, 0, 2),  # truncated
    (TWO, "```json\n" + TWO + "\n```", 0, 0, 2),  # a parser would not take it either
]


def test_extraction_metrics_of_the_table():
    references, predictions = [row[0] for row in TABLE], [row[1] for row in TABLE]
    hits, claimed, gold = (sum(row[i] for row in TABLE) for i in (2, 3, 4))
    found = generation_metrics(references, predictions, [True] * 12 + [False] * 3)
    assert found["stop_rate"] == pytest.approx(12 / 15)
    assert found["exact_match"] == pytest.approx(2 / 15)
    assert found["json_valid"] == pytest.approx(12 / 15)
    assert found["false_positive_rate"] == pytest.approx(2 / 4)
    assert found["empty_rate"] == pytest.approx(4 / 11)  # two empty, two that are no JSON
    assert (hits, claimed, gold) == (5, 10, 15)
    assert found["precision"] == pytest.approx(5 / 10)
    assert found["recall"] == pytest.approx(5 / 15)
    assert found["f1"] == pytest.approx(2 * 5 / 25)
    # by path: "people" and the bare list are claims of other paths
    assert found["precision.persons"] == pytest.approx(5 / 8)
    assert found["recall.persons"] == pytest.approx(5 / 15)
    assert "f1.people" not in found


def test_nested_leaves_are_scored_by_path():
    gold = {
        "persons": [{"name": "A", "address": "x"}, {"name": "B", "address": None}],
        "count": 2,
        "urgent": False,
    }
    claim = {
        "persons": [{"name": "A", "address": "y"}, {"name": "B", "address": ""}],
        "count": "2",
        "urgent": False,
    }
    assert list(leaves(gold)) == [
        ("persons.name", "A"),
        ("persons.address", "x"),
        ("persons.name", "B"),
        ("count", 2),
        ("urgent", False),
    ]
    found = generation_metrics([json.dumps(gold)], [json.dumps(claim)], [True])
    assert found["f1.persons.name"] == 1
    assert (
        found["f1.persons.address"] == 0 and found["recall.count"] == 0 and found["f1.urgent"] == 1
    )
    assert found["precision"] == found["recall"] == pytest.approx(3 / 5)
    assert found["exact_match"] == 0


def test_true_is_not_one_and_one_is_not_text():
    for gold, claim in ((True, 1), (1, "1"), (0, False), (1, True)):
        found = generation_metrics([json.dumps({"x": gold})], [json.dumps({"x": claim})], [True])
        assert found["f1"] == 0


def test_empty_means_no_truthy_leaf():
    for value in (None, {}, [], {"a": []}, {"a": {"b": None}}, {"a": ""}, {"a": 0}, {"a": [False]}):
        assert is_empty(value)
    for value in ({"a": "x"}, {"a": [0, 1]}, ["x"], {"a": {"b": True}}):
        assert not is_empty(value)


def test_answers_that_are_no_json_are_compared_as_text():
    found = generation_metrics(["four", "1"], ["four", "2"], [True, True])
    assert found == {"stop_rate": 1, "exact_match": 0.5}


def test_references_without_any_leaf_have_no_recall():
    found = generation_metrics([EMPTY, EMPTY], [EMPTY, ONE], [True, True])
    assert found["false_positive_rate"] == 0.5
    assert not {"recall", "precision", "f1", "empty_rate"} & set(found)


def test_perfect_answers_score_one():
    found = generation_metrics([ONE, TWO, EMPTY], [ONE, TWO, EMPTY], [True] * 3)
    ones = {"stop_rate", "exact_match", "json_valid", "precision", "recall", "f1", "f1.persons"}
    assert all(found[name] == 1 for name in ones)
    assert found["false_positive_rate"] == found["empty_rate"] == 0


def test_a_model_that_never_answers_in_json_is_always_wrong_where_nothing_is():
    found = generation_metrics([EMPTY] * 4, ["none", "null", '{"persons": [', EMPTY], [True] * 4)
    assert found["false_positive_rate"] == pytest.approx(3 / 4)
    assert found["json_valid"] == pytest.approx(1 / 4)


def test_thinking_is_no_part_of_an_answer():
    assert answer_of("<think>\nlet me see\n</think>\n\n" + ONE) == ONE
    assert answer_of(f" {ONE}\n") == ONE


def test_endless_brackets_are_no_json():
    assert generation_metrics([ONE], ["[" * 100_000], [False])["json_valid"] == 0


@pytest.mark.parametrize(
    "references",
    [
        ["four", "1"],
        [EMPTY],
        [ONE, TWO],
        [EMPTY, ONE, "no"],
        ['["x"]', '{"a": {"b": 1, "c": null}, "d": 0}'],
    ],
)
def test_metrics_are_named_as_they_will_be_measured(references):
    found = generation_metrics(references, references, [True] * len(references))
    assert metric_names(references) == list(found)


def test_without_references_no_answer_is_scored():
    assert metric_names([]) == []


def test_an_exact_match_is_shown_where_answers_are_no_json_alone():
    assert shown_of(["loss", "exact_match", "stop_rate"]) == ["loss", "exact_match"]
    assert shown_of(["loss", "exact_match", "f1", "recall.a"]) == ["loss", "f1"]
