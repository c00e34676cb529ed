"""Metrics in columns, on a terminal and in a file alike."""

from parts.lines import best_step_of, display_width, evaluation_lines, padded, result_lines


def columns_of(line, *texts):
    """Return where texts begin in a line, in columns of a terminal."""
    return [display_width(line[: line.index(text)]) for text in texts]


def test_wide_letters_take_two_columns_and_accents_none():
    assert display_width("recall@10") == 9
    assert display_width("日本語") == 6 and display_width("ｶﾅ") == 2 and display_width("Ａ") == 2
    # as macOS writes names of files: letters in parts
    assert display_width("が") == display_width("か\u3099") == 2
    assert display_width("한") == display_width("\u1112\u1161\u11ab") == 2
    assert display_width("é") == display_width("e\u0301") == 1
    assert display_width("ฎีกา") == 3  # a vowel above its consonant, which is one letter with none
    assert padded("日本語", 8) == "日本語  " and padded("long", 2) == "long"


SHOWN = {"faq_ndcg@10": "faq", "faq_recall@10": "faq"}
SHOWN |= {"日本語_ndcg@10": "日本語", "日本語_recall@10": "日本語"}
BEFORE = {"eval_faq_ndcg@10": 0.5, "eval_faq_recall@10": 0.75}
BEFORE |= {"eval_日本語_ndcg@10": 0.25, "eval_日本語_recall@10": 1.0}


def test_each_dev_set_has_a_line_whose_columns_meet_those_of_all_others():
    now = {name: value - 0.125 for name, value in BEFORE.items()}
    first = evaluation_lines(0, BEFORE, {}, SHOWN)
    then = evaluation_lines(120, now, BEFORE, SHOWN, best="faq_ndcg@10")
    assert then == [
        "step    120  faq_ndcg@10     0.3750 -0.1250   faq_recall@10     0.6250 -0.1250  best so far",
        "step    120  日本語_ndcg@10  0.1250 -0.1250   日本語_recall@10  0.8750 -0.1250",
    ]
    assert first[0] == "step      0  faq_ndcg@10     0.5000           faq_recall@10     0.7500"
    assert columns_of(first[1], "日本語_n", "0.25", "日本語_r", "1.0") == columns_of(
        then[0], "faq_n", "0.37", "faq_r", "0.62"
    )


def test_a_metric_that_one_dev_set_lacks_leaves_its_column_free():
    shown = {"b_mrr@10": "b", "a_ndcg@10": "a", "b_ndcg@10": "b"}
    first, second = evaluation_lines(3, {f"eval_{name}": 0.5 for name in shown}, {}, shown)
    assert first.startswith("step      3  b_mrr@10")  # the set that decides stands first
    assert columns_of(first, "b_ndcg@10") == columns_of(second, "a_ndcg@10")


def test_many_metrics_go_on_in_the_next_line_in_the_same_columns():
    names = ("loss", "json_valid", "false_positive_rate", "recall", "f1")
    metrics = {f"eval_{name}": 0.5 for name in names}
    lines = evaluation_lines(30, metrics, metrics, dict.fromkeys(names, ""), best="loss")
    assert len(lines) == 2 and all(len(line) <= 120 for line in lines)
    assert lines[0].endswith("rate  0.5000 +0.0000  best so far") and "best" not in lines[1]
    assert columns_of(lines[0], "dev_loss", "json_valid") == columns_of(lines[1], "recall", "f1")
    # beside the training's own loss
    assert lines[0].startswith("step     30  dev_loss") and " loss" not in lines[0]


def test_numbers_of_any_size_keep_their_columns():
    shown = {"margin": "", "accuracy": ""}
    lines = []
    for margin in (0.0, 12.34567, -12.34567, 1234.567, -1e5, float("nan"), float("inf")):
        metrics = {"eval_margin": margin, "eval_accuracy": 1.0}
        lines += evaluation_lines(5, metrics, {"eval_margin": 0.0, "eval_accuracy": 0.5}, shown)
    assert len({line.index("accuracy") for line in lines}) == 1
    assert "margin 12.3457 +12.346 " in lines[1] and "margin -12.346 -12.346 " in lines[2]
    assert "nan" in lines[5] and "inf" in lines[6]


def test_no_line_without_a_metric_that_is_shown():
    assert evaluation_lines(5, {"eval_stop_rate": 1.0}, {}, {"loss": ""}) == []
    assert evaluation_lines(5, {"train_runtime": 1.0}, {}, {}) == []


def test_the_last_lines_say_before_after_and_the_change():
    before = {"a_loss": 12.5, "日本_loss": 1.25, "a_f1": 0.0}
    after = {"a_loss": 2.25, "日本_loss": 1.5, "a_f1": 1.0}
    assert result_lines(before, after, [*before, "not_measured"]) == [
        "result    a_loss    12.5000 before, 2.2500 after, -10.2500",
        "result    日本_loss  1.2500 before, 1.5000 after,  +0.2500",
        "result    a_f1       0.0000 before, 1.0000 after,  +1.0000",
    ]
    assert result_lines({}, {}, []) == []


def test_the_best_step_is_the_first_of_equals_and_never_the_untrained_model():
    log = [{"step": step, "eval_m": value} for step, value in enumerate([0.9, 0.2, 0.5, 0.5, 0.4])]
    assert best_step_of(log, "m", True) == 2
    assert best_step_of(log, "m", False) == 1
    assert best_step_of(log[:1], "m", True) is None and best_step_of([], "m", True) is None
    broken = [{"step": 1, "eval_m": float("nan")}, {"step": 2, "loss": 1.0}]
    assert best_step_of(broken, "m", True) is None
    assert best_step_of([*broken, {"step": 3, "eval_m": 0.1}], "m", True) == 3
