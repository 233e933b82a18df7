"""IFEval's instructions: each is followed by one text and not by another."""

import sys
import time

import pytest
from tiny import needs

from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback.ifeval import CHECKS, ifeval
from prefuse.trainer.rewards import Feedback
from prefuse.trainer.rows import load_rows

ENGLISH = "this is a short letter about the weather in the north of the country"
needs_langdetect = needs("langdetect", "rewards")

CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG day",
        "a BIG day",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.upper()),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name], [street]",
        "[name]",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\nP.S. hello",
        "Bye. PS hello",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye.\nP.P.S. hello",
        "P.S. hello",
    ),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "no"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* one\n- two",
        "* one\n* two\n* three",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*one* and *two*",
        "*one*",
    ),
    ("detectable_format:title", {}, "<<Spring>>\ntext", "<< >>\ntext"),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "Cats and dogs", "cats"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "category", "a cat"),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        "cat, Cat",
        "cat",
    ),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "less than"},
        "cat",
        "cat cat",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "at least"},
        "Zz",
        "z",
    ),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein Brief über das Wetter",
        ENGLISH,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "a b\n\n'Then, c",
        "then a\n\nb",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb",
        "a\n***\nb\n***\nc",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        "One. Two! Is it 3.5?",
        "Mr. A. Smith said it. Yes!",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "these three words",
    ),
    ("punctuation:no_comma", {}, "none; here", "one, here"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'it is "the end."', "the end. Not"),
    ("startend:quotation", {}, '"quoted"', 'not "quoted"'),
]


def told_by_languages(instruction: str) -> bool:
    return instruction.startswith(("language", "change_case:english"))


@pytest.mark.parametrize(
    "instruction, arguments, good, bad",
    [
        pytest.param(*case, marks=needs_langdetect if told_by_languages(case[0]) else ())
        for case in CASES
    ],
)
def test_an_instruction_is_followed_or_not(instruction, arguments, good, bad):
    arguments = {**arguments, "not_its_own": None}  # tables store every argument, most as None
    assert ifeval([good, bad, ""], [[instruction]] * 3, [[arguments]] * 3) == [1.0, 0.0, 0.0]


def test_blank_lines_without_end_are_read_in_no_time():
    ids = ["detectable_format:number_bullet_lists", "detectable_content:postscript"]
    arguments = [{"num_bullets": 1}, {"postscript_marker": "P.S."}]
    text = " \n" * 50_000 + " * one"
    started = time.monotonic()
    assert ifeval([text], [ids], [arguments]) == [0.5]
    assert time.monotonic() - started < 2


def test_every_kind_has_a_case():
    assert {case[0] for case in CASES} == CHECKS.keys()


def test_shares_unknown_kinds_and_the_loose_form():
    ids = [["punctuation:no_comma", "keywords:existence", "new:kind"], ["new:kind"]]
    kwargs = ['[{}, {"keywords": ["cat"]}, {}]', [{}]]
    feedback = Feedback(["ifeval"])
    columns = {"instruction_id_list": ids, "kwargs": kwargs}
    scores = feedback(["p", "p"], ["a dog", "a dog"], [[1], [1]], columns, [0, 1])
    assert scores.rewards[0, 0] == 0.5 and scores.rewards[1, 0] != scores.rewards[1, 0]
    assert scores.metrics == {"ifeval/unknown_instructions": 2.0} and scores.failures == {}
    ending = [[{"end_phrase": "bye."}]]
    given = (["Sure, here.\nbye.\nAnything else?"], [["startend:end_checker"]], ending)
    assert ifeval(*given) == [0.0] and ifeval(*given, loose=True) == [1.0]


@pytest.mark.parametrize("text", ["one, line", "*one*, line", "a, b\nc, d"])
def test_what_is_left_of_a_text_without_its_lines_follows_nothing(text):
    assert ifeval([text], [["punctuation:no_comma"]], [[{}]], loose=True) == [0.0]


def test_a_placeholder_stands_in_one_line():
    arguments = [[{"num_placeholders": 1}]]
    assert ifeval(["[a\nb]"], [["detectable_content:number_placeholders"]], arguments) == [0.0]


def test_a_row_without_instructions_does_not_apply():
    assert ifeval(["a", "b"], [None, ["punctuation:no_comma"]], [None, [{}]]) == [None, 1.0]


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="no_comma: wanted other kwargs"):
        ifeval(["a"], [["punctuation:no_comma"]], [[{"relation": "less than"}]])
    with pytest.raises(UserError, match="wanted 'less than' or 'at least'; got 'at most'"):
        given = {"num_words": 3, "relation": "at most"}
        ifeval(["a"], [["length_constraints:number_words"]], [[given]])


def test_without_langdetect_languages_do_not_apply(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    given = [["language:response_language"]], [[{"language": "de"}]]
    assert ifeval([ENGLISH], *given) == [None]


@needs_langdetect
def test_every_instruction_of_the_benchmark_is_known(data_dir):
    rows = load_rows(str(data_dir / "verifiable/ifeval_input_data.jsonl"))
    columns = [[row.columns[name] for row in rows] for name in ("instruction_id_list", "kwargs")]
    rewards = ifeval(["A text."] * len(rows), *columns)
    assert len(rewards) == 541 and None not in rewards
    assert 0.2 < sum(rewards) / len(rewards) < 0.5
