"""Rows -> prompts to sample from."""

import pytest
from tiny import WORDS, tiny_tokenizer

from prefuse.trainer.errors import UserError
from prefuse.trainer.prompts import load_prompts
from prefuse.trainer.rows import Row


def load(rows, max_length=None):
    return load_prompts(
        [Row(r, f"rows:{i}") for i, r in enumerate(rows, 1)], tiny_tokenizer(), max_length
    )


def words(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


@pytest.mark.parametrize("column", ["prompt", "question", "problem"])
def test_the_prompt_and_what_rewards_read(column):
    (prompt,), ledger = load([{column: "w1 w2", "answer": "7"}])
    assert words(prompt.tokens) == "w1 w2" and prompt.prompt == "w1 w2"
    assert prompt.columns == {"answer": "7"} and prompt.where == "rows:1"
    assert (ledger.rows, ledger.kept, ledger.tokens) == (1, 1, 2)


def test_a_prompt_beside_a_question_is_the_prompt():
    (prompt,), _ = load([{"prompt": "w1", "question": "w2"}])
    assert words(prompt.tokens) == "w1" and prompt.columns == {"question": "w2"}


def test_what_a_row_lacks_is_none():
    """Of rows of several tasks a window may have any."""
    first, second = load([{"prompt": "w1", "answer": "7"}, {"prompt": "w2", "tests": "x"}])[0]
    assert first.columns == {"answer": "7", "tests": None}
    assert second.columns == {"answer": None, "tests": "x"}


def test_a_conversation_ends_with_the_generation_prompt():
    messages = [{"role": "user", "content": "w1 w2"}]
    (prompt,), _ = load([{"prompt": messages}])
    assert words(prompt.tokens) == "user : w1 w2 assistant :" and prompt.prompt == messages


def test_long_prompts_are_skipped_and_counted():
    prompts, ledger = load([{"prompt": "w1 w2 w3"}, {"prompt": "w1"}], max_length=2)
    assert [p.where for p in prompts] == ["rows:2"] and ledger.too_long == 1
    assert "1 skipped: longer than max_prompt_length" in list(ledger.lines())
    with pytest.raises(UserError, match="no prompt is left"):
        load([{"prompt": "w1 w2 w3"}], max_length=2)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "w1"}, "rows:1: wanted a column 'prompt'"),
        ({"prompt": ""}, "rows:1: 'prompt' is empty"),
        ({"prompt": 3}, "rows:1: 'prompt': wanted text or a list"),
    ],
)
def test_rows_that_are_no_prompts(row, message):
    with pytest.raises(UserError, match=message):
        load([row])
