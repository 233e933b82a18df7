"""Verifiers of mathematics: which answer is found, and which answers are the same."""

import json
import random
import threading
import time

import pytest
from tiny import needs

from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback import symbolic as symbolic
from prefuse.trainer.feedback.answers import final_answer, final_number, gold_answer, number, tidy
from prefuse.trainer.feedback.maths import accuracy, gsm8k, math, same

needs_math_verify = needs("math_verify", "rewards")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("16 - 3 = <<16-3=13>>13 left\n#### 13", 13),
        ("so 5.\n####5 ", 5),
        ("#### $1,234.50 dollars.", 1234.5),
        ("#### -7", -7),
        ("#### - 7", 7),
        ("#### 2\n#### 3", 3),
        ("She sells 9 for $2 each.\nA: 18", 18),
        ("Hence **The answer is: $72$.**", 72),
        ("The answer is 3/4 of the 8 cakes.", 0.75),
        ("The final answer is 18. I hope it is correct, on 3 tries.", 18),
        ("First \\boxed{3}, no: $\\boxed{1{,}004}$ of 2000", 1004),
        ("\\boxed{\\frac{7}{2}}", 3.5),
        ("\\boxed{\\$ 18.00} and 4", 18),
        ("\\boxed{50\\%}", 50),
        ("it is 12, so they have 16-4=12 of 13.0.", 13),
        ("x = \u22125", -5),
        ("-$3 in the end", -3),
        ("It costs $-3", -3),
        ("a total of 1.5e3", 1500),
        (".5", 0.5),
        ("1,2345", 2345),
        ("0 or -0", 0),
        ("3 1/2 cups", 3.5),
        ("\\boxed{3\\frac{1}{2}}", 3.5),
        ("-\\dfrac12", -0.5),
        ("To answer it: 3 apples were left. So she had 12.", 12),
        ("The answer to the first part is 12. Then 5 more came.", 12),
        ("#### Step 2\nAdd 3 and 4.\nThe answer is 7.", 7),
        ("#### Answer\n42", 42),
        ("So the answer is 20 - 5 = 15 apples.", 15),
        ("\\boxed{12 \\times 3 = 36}", 36),
        ("#### 5+3=8", 8),
        ("The answer is $20 - $5 = $15, as 3 = 3.", 15),
        ("The answer is 8 = 5 + 3.", 8),
        ("The answer is 12, since 12 + 3 = 15.", 12),
        (
            "<think>\\boxed{3}, or #### 4</think>\n<answer>5 apples</answer> I hope it helps 100 %",
            5,
        ),
        ("The answer is 3. <answer>", None),
        ("5/0", None),
        ("no number", None),
        ("9" * 5000, None),
        ("", None),
        ("####", None),
    ],
)
def test_the_final_number(text, wanted):
    assert final_number(text) == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("\\boxed{1}, or \\fbox{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("so \\boxed 7 it is", "7"),
        ("cut off: \\boxed{1} and \\boxed{\\frac{1}{2}", "1"),
        ("1 + 1\n#### 2\nthat is all", "2"),
        ("Final Answer: The final answer is $x^2$. I hope it is correct.", "x^2"),
        ("The answer is 7.5. Thanks.", "7.5"),
        ("**Answer:** \\(3\\sqrt{2}\\)", "3\\sqrt{2}"),
        ("we get $a$ and then $b + 1$.", "b + 1"),
        ("that makes 12 in all", "12"),
        ("none", None),
        ("The correct option is B.", "B"),
        ("**Final Answer**\n\n\\[ x + 1 \\]", "x + 1"),
        ("#### Result\nThe answer is $x$.", "x"),
        ("<think>\\boxed{3}</think> <answer>x^2 + 1</answer>", "x^2 + 1"),
        ("<answer>It is $x$, so \\boxed{y}</answer> for $z$", "y"),
    ],
)
def test_the_final_answer(text, wanted):
    assert final_answer(text) == wanted


SAME = [
    ("10000", "10\\,000"),
    ("1234567.5", "1\\,234\\ 567.5"),
    ("5", "5~\\mathrm{cm}"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac12", "\\dfrac{1}{2}"),
    ("1/2", "\\tfrac{1}{2}"),
    ("\\frac{3}{6}", "\\frac{1}{2}"),
    ("-\\frac{1}{8}", "\\frac{-1}{8}"),
    ("2\\frac58", "2.625"),
    ("10{,}000", "10,000"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"),
    ("\\$32,\\!348", "32348"),
    ("10\\%", "10"),
    ("18", "\\$18.00"),
    ("5", "5."),
    ("5", "x = 5"),
    ("x=5", "5"),
    ("0", "-0"),
    ("90", "90^\\circ"),
    ("12", "12\\text{ cm}^2"),
    ("12\\text{ inches}", "12"),
    ("6", "6 apples"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(C)}", "C"),
    ("\\text{even}", "\\mathrm{Even}"),
    ("4210_{7}", "4210_7"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"),
    ("[-2,7]", "x \\in [-2,7]"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty,2)\\cup(3,\\infty)"),
    ("1, 2, 3", "3, 2, 1"),
    ("\\{1, 2\\}", "\\{2, 1\\}"),
    ("3\\sqrt{2}", "\\sqrt{18}"),
    ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("\\frac{3\\sqrt3}{2}", "3\\sqrt{3}/2"),
    ("(x+1)^2", "x^2+2x+1"),
    ("\\frac{x+2}{7}", "(x+2)/7"),
    ("2^{10}", "1024"),
    ("5!", "120"),
    ("\\binom{5}{2}", "10"),
    ("y = 2x + 3", "y = 3 + 2x"),
    ("y=2x+3", "2x + 3"),
    ("3 + 4i", "4i+3"),
    ("\\pi", "\\pi "),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    (
        "\\begin{pmatrix} 1/2 & 0 \\\\ 0 & 1 \\end{pmatrix}",
        "\\begin{bmatrix} 0.5 & 0 \\\\ 0 & 1 \\end{bmatrix}",
    ),
    ("x \\le 3", "x\\leq 3"),
    ("3.5", "3 1/2"),
    ("2", "\\text{two}"),
    ("0.75", "75\\%"),
    ("50\\%", "50 percent"),
    ("1500", "1.5 \\times 10^3"),
    ("0.\\overline{3}", "\\frac13"),
    ("\\pm 5", "5, -5"),
    ("5, -5", "x = 5 \\text{ or } x = -5"),
    ("3 \\pm 2\\sqrt{2}", "3 + 2\\sqrt{2}, 3 - 2\\sqrt{2}"),
    ("-2, 5", "5 \\text{ and } -2"),
    ("(3,0), (-3,1)", "(-3, 1) \\text{ and } (3, 0)"),
    ("100, \\frac{1}{100}", "0.01, 100"),
    ("12", "12^{\\mathrm{th}} \\text{ grade}"),
    ("15000", "15,000 \\, \\text{kcal m}^{-2} \\text{ yr}^{-1}"),
    ("10", "10\\ \\mathrm{cm}"),
    ("2\\sqrt{3}", "2\u221a3"),
    ("12\\pi", "12\u03c0"),
    ("x^2 + 1", "x\u00b2 + 1"),
    ("x^2 - 2x + 2", "g(x) = x^2 - 2x + 2"),
    ("(-\\infty, 0] \\cup [3, \\infty)", "[3, \\infty) \\cup (-\\infty, 0]"),
    ("\\emptyset", "\\varnothing"),
    ("\\log_2 8", "3"),
    ("\\frac{v}{r}\\frac{1}{(1 + s/r)^{3/2}}", "\\frac{v}{r (1 + \\frac{s}{r})^{3/2}}"),
    ("\\text{No solution}", "no solution"),
]
DIFFERENT = [
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("5", "-5"),
    ("4t", "4"),
    ("4", "4t"),
    ("12", "1,2"),
    ("1,234", "1,235"),
    ("(1, 2)", "(2, 1)"),
    ("[1, 2]", "(1, 2)"),
    ("[2, 5)", "[2, 5]"),
    ("\\sqrt{2}", "2"),
    ("x^2 + 1", "x^2 - 1"),
    ("x < 3", "x > 3"),
    ("3", "3\\sqrt{2}"),
    ("10", "10\\pi"),
    ("\\text{Evelyn}", "Briana"),
    ("\\text{(C)}", "B"),
    ("1, 2, 3", "1, 2"),
    ("2^{10}", "1023"),
    ("0.333", "\\frac{1}{3}"),
    ("4210_7", "4210_8"),
    ("3", ""),
    ("3", "\\frac{3"),
    ("3", "9^{9^{9^{9^{9}}}}"),
    ("10", "factorial(factorial(factorial(9)))"),
    ("6", "__import__('os').getpid()"),
    ("3 1/2", "31/2"),
    ("12", "1 2"),
    ("2", "\\text{three}"),
    ("1", "1000\\%"),
    ("20", "2000"),
    ("102018", "102019"),
    ("14", "1, 4"),
    ("2", "2, 3"),
    ("2", "x > 2"),
    ("x > 2", "x \\ge 2"),
    ("(2, \\infty)", "[2, \\infty)"),
    ("(-\\sqrt{3}, \\sqrt{3})", "[-\\sqrt{3}, \\sqrt{3}]"),
    ("1, 3, 9, 11", "1, 11, 6 + \\sqrt6, 6 - \\sqrt6"),
    ("y = 2x", "y = 2x + 1"),
    ("90", "\\frac{\\pi}{2}"),
    ("0", "\\emptyset"),
    ("\\text{east}", "west"),
    ("C", "Cx"),
]


@needs_math_verify
@pytest.mark.parametrize("gold, answer", SAME)
def test_answers_that_are_the_same(gold, answer):
    assert same(gold, answer) and same(answer, gold)


@needs_math_verify
@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_answers_that_differ(gold, answer):
    assert not same(gold, answer)


@needs_math_verify
@pytest.mark.parametrize(
    "gold, answer, right",
    [
        ("\\text{(C)}", "(C) Plane", True),
        ("\\text{(C)}", "(B) Cone", False),
        ("C", "C. 4", True),
        ("C", "\\textbf{(C)}\\ 3", True),
        ("C", "\\textbf{(B) }3", False),
        ("(B)", "\\textbf{(B)}", True),
        ("C", "C(5, 2)", False),
        ("C", "C x", False),
    ],
)
def test_letters_of_choices(gold, answer, right):
    assert same(gold, answer) is right


@needs_math_verify
@pytest.mark.parametrize(
    "solution, gold, right",
    [
        ("First \\boxed{4}. No: \\boxed{5}.", "5", True),
        ("First \\boxed{4}. No: \\boxed{5}.", "4", False),
        ("so $x$ is \\boxed{2} or \\boxed{3}.", "2, 3", True),
        ("$x = \\boxed{2}$\nand $y = \\boxed{3}$", "2, 3", False),
        ("<think>it may be \\boxed{3}</think> It is \\boxed{4}.", "4", True),
        ("The answer is: \\( \\frac{1}{2} \\).", "0.5", True),
        ("The answer is 0.75 of it.", "\\frac{3}{4}", True),
        ("The answer is twelve.", "12", True),
        ("I'm confident that the answer is correct. The radius of $C$ is 3 units.", "3", True),
        ("The answer should be 8 meals.", "8", True),
        ("Thus the value of \\( 9 \\& 2 \\) is \\( \\frac{3\\sqrt{3}}{4} \\).", "3\\sqrt3/4", True),
        ("The units digit of \\(8^6\\), \\(18^6\\) is 4.", "4", True),
        ("Cost: $15. Profit: $93 - $15 = $78.", "78", True),
        ("We had \\[A = \\frac{1}{(a-b)} + \\frac{1}{(b-a)}\\] And", "0", False),
        ("So the answer is (C).", "\\text{(C)}", True),
        ("I can't answer it.", "3", False),
        ("The answer is 5 - 3 = 2.", "2", True),
        ("The answer is 5 - 3 = 2.", "5", False),
        ("\\boxed{2}, \\boxed{3} <answer>7</answer>", "2, 3", False),
    ],
)
def test_solutions_as_models_write_them(solution, gold, right):
    assert math([solution], [gold]) == [float(right)]


@pytest.mark.parametrize(
    "file, verify, solution, answer",
    [
        ("gsm8k_train.jsonl", gsm8k, "answer", lambda row: row["answer"].rpartition("#### ")[2]),
        pytest.param(
            *("math500.jsonl", accuracy, "solution", lambda row: row["answer"]),
            marks=needs_math_verify,
        ),
    ],
)
def test_solutions_of_people(file, verify, solution, answer, data_dir):
    """Each is right by its own answer, and wrong by that of the next row unless it is the same."""
    lines = (data_dir / "verifiable" / file).read_text().splitlines()[:1000]
    rows = [json.loads(line) for line in lines]
    solutions, own = [row[solution] for row in rows], [answer(row) for row in rows]
    other = own[1:] + own[:1]
    assert verify(solutions, own) == [1.0] * len(rows)
    wanted = [float(a == b) for a, b in zip(own, other, strict=True)]
    agreed = sum(a == b for a, b in zip(verify(solutions, other), wanted, strict=True))
    assert agreed >= 0.998 * len(rows)


@pytest.mark.parametrize(
    "gold, wanted",
    [
        ("so $\\boxed{2}$ in all", "2"),
        ("1 + 1 = 2\n#### 2", "2"),
        ("She has 16 - 3 = 13 left.\nA: 13", "13"),
        ("Therefore the answer is $x + 1$.", "x + 1"),
        ("\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\\n2 \\end{pmatrix}"),
        (" 5 ", "5"),
    ],
)
def test_the_answer_of_a_reference(gold, wanted):
    assert gold_answer(gold) == wanted


@needs_math_verify
def test_rows_without_a_reference_do_not_apply():
    assert gsm8k(["2", "#### 4"], ["#### 2", None]) == [1.0, None]
    assert math(["\\boxed{2}", "2"], ["2", None]) == [1.0, None]
    completions = [[{"role": "assistant", "content": "so \\boxed{3\\sqrt{2}}"}]] * 2
    assert accuracy(completions, ["it is \\boxed{\\sqrt{18}}", "\\boxed{4}"]) == [1.0, 0.0]


def test_a_verifier_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(symbolic, "available", lambda: False)
    with pytest.raises(UserError, match="pip install math-verify"):
        math(["2"], ["2"])


@needs_math_verify
def test_text_is_never_executed(tmp_path):
    """What sympy's parser would run as Python is refused, as an answer and as a reference."""
    mark = tmp_path / "mark"
    for text in (
        f"__import__('pathlib').Path('{mark}').touch()",
        f"open('{mark}', 'w')",
        f"\\text{{open('{mark}', 'w')}}",
        f"sympify(\"open('{mark}','w')\")",
    ):
        assert not symbolic.equal("6", text) and not symbolic.equal(text, "6")
    assert not mark.exists()
    assert symbolic.equal("\\sqrt{8}", "2\\sqrt{2}")  # the process still answers


@needs_math_verify
def test_in_threads_and_after_a_hang():
    """math-verify's time-outs are signals, which threads do not get: the process has them."""
    results = []
    for gold in ("\\sqrt{12}", "9^{9^{9^{9}}}!", "\\sqrt{20}"):
        run = lambda gold=gold: results.append(symbolic.equal(gold, "2\\sqrt{3}"))  # noqa: E731
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
    assert results == [True, False, False]


LETTERS = "0123456789.,-+*/^_{}[]()$\\ \n=%#:!<>|abAxyπ√∞−½\u00a0\ud800é"
WORDS = (
    *("\\boxed{", "\\frac{", "\\frac", "}{", "####", "answer is", "\\sqrt", "\\text{", "\\left("),
    *(
        "\\begin{pmatrix}",
        "\\end{pmatrix}",
        "\\int",
        "\\sum_{",
        "^{",
        "\\cup",
        "\\infty",
        "10^9",
        "9!",
    ),
    *("e", "1e99", "\\$", "\\\\", "&", "\\{", "A:", "\x00", "lambda:", "__import__('os')"),
)


def random_texts(count, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        pieces = rng.choices((*LETTERS, *WORDS), k=rng.randrange(40))
        yield "".join(pieces)


def test_random_text_neither_raises_nor_hangs():
    started = time.monotonic()
    texts = list(random_texts(10_000))
    assert set(gsm8k(texts, texts)) <= {None, 0.0, 1.0}
    for text in texts:
        final_answer(text), number(tidy(text))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "text", ["\\boxed{", "{", "answer is ", "\n ", "1,", "$", "9", "\\text{", "- "]
)
def test_long_repetitions_take_linear_time(text):
    started = time.monotonic()
    for repeated in (text * 20_000, text * 20_000 + "}" * 20_000):
        gsm8k([repeated], ["1"])
        same("1", final_answer(repeated) or "")
    assert time.monotonic() - started < 4


@needs_math_verify
@pytest.mark.full
def test_ten_thousand_random_answers_are_judged():
    texts = list(random_texts(10_000, seed=1))
    golds = [tidy(final_answer(text) or text) for text in random_texts(10_000, seed=2)]
    assert set(math([f"\\boxed{{{text}}}" for text in texts], golds)) <= {0.0, 1.0}
    assert math(["\\boxed{\\sqrt{8}}"], ["2\\sqrt{2}"]) == [1.0]
