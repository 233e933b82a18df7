"""Rows of every format -> the same tokens and masks as by hand; and the ledger counts them all."""

import csv
import gzip
import json

import numpy as np
import pytest
from tiny import CHAT, WORDS, tiny_tokenizer, write_rows

from prefuse.kernels.preference import LOSSES, hyperparameters
from prefuse.trainer.data import common_prefix, pair_examples, sft_examples
from prefuse.trainer.errors import UserError
from prefuse.trainer.objectives import learns_from_identical
from prefuse.trainer.rows import FILE_KINDS, Row, load_rows

EOS = "</s>"


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def told(sequence) -> tuple[list[int], list[int]]:
    """All tokens, and those that are scored."""
    return sequence.tokens.tolist(), sequence.tokens[sequence.scored].tolist()


def sft(row: dict, max_length: int | None = None, tokenizer=None, **options):
    examples, ledger = sft_examples(
        [Row(row, "rows:1")], tokenizer or tiny_tokenizer(), max_length, **options
    )
    return told(examples[0].sequences[0]), ledger


def pairs(rows: list[dict], max_length: int | None = None, **options):
    given = [Row(row, f"rows:{i}") for i, row in enumerate(rows, 1)]
    examples, ledger = pair_examples(given, tiny_tokenizer(), max_length, **options)
    return [tuple(told(s) for s in e.sequences) for e in examples], ledger


CHAT_SFT = "user : w1 w2 assistant : w3 w4 </s>"


@pytest.mark.parametrize(
    "row, options, whole, scored",
    [
        ({"text": "w1 w2 w3"}, {}, f"w1 w2 w3 {EOS}", f"w2 w3 {EOS}"),
        ({"text": f"w1 w2 {EOS}"}, {}, f"w1 w2 {EOS}", f"w2 {EOS}"),
        ({"prompt": "w1 w2", "completion": " w3"}, {}, f"w1 w2 w3 {EOS}", f"w3 {EOS}"),
        ({"prompt": "", "completion": "w3 w4"}, {}, f"w3 w4 {EOS}", f"w4 {EOS}"),
        (
            {"prompt": "w1 w2", "completion": " w3"},
            {"completion_only": False},
            f"w1 w2 w3 {EOS}",
            f"w2 w3 {EOS}",
        ),
        (
            {"messages": [user("w1 w2"), assistant("w3 w4")]},
            {},
            CHAT_SFT,
            CHAT_SFT.removeprefix("user "),
        ),
        (
            {"messages": [user("w1 w2"), assistant("w3 w4")]},
            {"assistant_only": True},
            CHAT_SFT,
            f"w3 w4 {EOS}",
        ),
        (
            {"prompt": [user("w1 w2")], "completion": [assistant("w3 w4")]},
            {},
            CHAT_SFT,
            f"w3 w4 {EOS}",
        ),
        (
            {
                "prompt": [user("w1"), assistant("w2")],
                "completion": [user("w3"), assistant("w4")],
            },
            {"assistant_only": True},
            f"user : w1 assistant : w2 {EOS} user : w3 assistant : w4 {EOS}",
            f"w4 {EOS}",
        ),
    ],
)
def test_sft_formats(row, options, whole, scored):
    got, ledger = sft(row, **options)
    assert got == (ids(whole), ids(scored))
    assert (ledger.rows, ledger.kept, ledger.without_eos) == (1, 1, 0)
    assert (ledger.tokens, ledger.scored_tokens) == (len(ids(whole)), len(ids(scored)))


CHAT_PAIR = {"chosen": [assistant("w3 w4")], "rejected": [assistant("w5")]}
CHAT_WANTED = (
    ("user : w1 assistant : w3 w4 </s>", "w3 w4 </s>"),
    ("user : w1 assistant : w5 </s>", "w5 </s>"),
)
TEXT_WANTED = (("w1 w2 w3 w4 </s>", "w3 w4 </s>"), ("w1 w2 w5 </s>", "w5 </s>"))


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}, TEXT_WANTED),
        ({"chosen": "w1 w2 w3 w4", "rejected": "w1 w2 w5"}, TEXT_WANTED),
        ({"prompt": [user("w1")], **CHAT_PAIR}, CHAT_WANTED),
        ({k: [user("w1"), *v] for k, v in CHAT_PAIR.items()}, CHAT_WANTED),
        # as ultrafeedback has it: the prompt as text beside whole conversations
        ({"prompt": "w1", **{k: [user("w1"), *v] for k, v in CHAT_PAIR.items()}}, CHAT_WANTED),
        # the completions begin alike: still scored from where the prompt ends
        (
            {"prompt": "w1", "chosen": " w2 w3", "rejected": " w2 w4"},
            (("w1 w2 w3 </s>", "w2 w3 </s>"), ("w1 w2 w4 </s>", "w2 w4 </s>")),
        ),
        # nothing in common: the first token of each is predicted by nothing
        (
            {"chosen": "w1 w2", "rejected": "w3 w4"},
            (("w1 w2 </s>", "w2 </s>"), ("w3 w4 </s>", "w4 </s>")),
        ),
    ],
)
def test_pair_formats(row, wanted):
    (got,), ledger = pairs([row])
    assert got == tuple((ids(whole), ids(scored)) for whole, scored in wanted)
    assert (ledger.kept, ledger.without_eos, ledger.truncated) == (1, 0, 0)


@pytest.mark.parametrize("marker", ["{%- generation %}", "{%generation-%}"])
def test_markers_of_a_template_may_strip_spaces(marker):
    tokenizer = tiny_tokenizer(chat_template=CHAT.replace("{% generation %}", marker))
    row = {"messages": [user("w1 w2"), assistant("w3 w4")]}
    got, _ = sft(row, tokenizer=tokenizer, assistant_only=True)
    assert got[1] == ids(f"w3 w4 {EOS}")


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"messages": [user("w1")]}, {"completion_only": True}, "--completion_only_loss wants"),
        ({"text": "w1 w2"}, {"completion_only": True}, "--completion_only_loss wants"),
        ({"text": "w1 w2"}, {"assistant_only": True}, "--assistant_only_loss wants messages"),
        (
            {"prompt": "w1", "completion": " w2"},
            {"assistant_only": True},
            "--assistant_only_loss wants messages",
        ),
    ],
)
def test_masks_that_a_row_cannot_have(row, options, message):
    with pytest.raises(UserError, match=f"^rows:1: {message}"):
        sft(row, **options)


def test_a_prompt_of_text_that_conversations_do_not_hold():
    """It would be dropped; one that both begin with is there already."""
    row = {"prompt": "w1", "chosen": [assistant("w2")], "rejected": [assistant("w3")]}
    with pytest.raises(UserError, match="^rows:1: 'prompt': wanted messages, as 'chosen' is"):
        pairs([row])
    held = {side: [user("w1"), *row[side]] for side in ("chosen", "rejected")}
    assert pairs([row | held]) == pairs([held])


def test_identical_pairs_stay_where_a_loss_learns_from_them():
    rows = [{"prompt": "w1", "chosen": " w3", "rejected": c} for c in (" w3", " w4")]
    assert len(pairs(rows)[0]) == 1
    got, ledger = pairs(rows, identical=True)
    assert len(got) == 2 and got[0][0] == got[0][1] and ledger.identical == 0
    for name, learns in [("sigmoid", False), ("cpo", True), ("mmpo", False), ("dpop", True)]:
        assert learns_from_identical(name, hyperparameters(LOSSES[name])) == learns


def test_the_ledger_counts_what_became_of_pairs():
    rows = [
        {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"},
        {"prompt": "w1 w2", "chosen": " w3", "rejected": " w3"},  # identical
        {"prompt": "w1 w2 w3 w4 w5 w6", "chosen": " w3", "rejected": " w4"},  # prompt too long
        {"prompt": "w1", "chosen": " w3 w4 w5 w6 w7", "rejected": " w4"},  # truncated
        {
            "prompt": "w1",
            "chosen": " w2 w3 w4 w5 w6",
            "rejected": " w2 w3 w4 w5 w7",
        },  # alike so far
    ]
    got, ledger = pairs(rows, max_length=5)
    assert len(got) == 2 and got[1][0] == (ids("w1 w3 w4 w5 w6"), ids("w3 w4 w5 w6"))
    assert (ledger.rows, ledger.kept, ledger.identical) == (5, 2, 2)
    assert (ledger.prompt_fills_max_length, ledger.truncated, ledger.without_eos) == (1, 1, 1)
    assert ledger.tokens == 4 + 4 + 5 + 3
    assert ledger.scored_tokens == 2 + 2 + 4 + 2
    assert ledger.rows == ledger.kept + ledger.identical + ledger.prompt_fills_max_length
    told = "\n".join(ledger.lines())
    assert "2 of 5 rows kept, 16 tokens, 10 of them trained on" in told
    assert "1 truncated to max_length" in told and "1 without EOS at the end" in told


def test_the_ledger_counts_what_became_of_sft_rows():
    rows = [
        Row({"prompt": "w1 w2 w3 w4", "completion": " w5"}, ""),
        Row({"prompt": "w1 w2", "completion": " w3 w4"}, ""),
        Row({"text": "w1"}, ""),
    ]
    examples, ledger = sft_examples(rows, tiny_tokenizer(), 4)
    assert [told(e.sequences[0]) for e in examples] == [
        (ids("w1 w2 w3 w4"), ids("w3 w4")),
        (ids("w1 </s>"), ids("</s>")),
    ]
    assert (ledger.rows, ledger.kept, ledger.prompt_fills_max_length) == (3, 2, 1)
    assert (ledger.truncated, ledger.without_eos) == (1, 1)


def test_columns_that_a_judge_filled():
    """In the loss's order, with the row they belong to; wrong ones name file and line."""
    row = {"prompt": "w1", "chosen": " w2", "rejected": " w3", "margin": 2, "preference": 0.75}
    same = row | {"rejected": " w2"}
    rows = [Row(columns, "pairs.jsonl:1") for columns in (same, row)]
    examples, _ = pair_examples(rows, tiny_tokenizer(), 16, ("preference", "margin"))
    assert [e.judged for e in examples] == [(0.75, 2.0)]
    for column, value, wanted in (
        ("margin", None, "a number"),
        ("margin", "much", "a number"),
        ("margin", True, "a number"),
        ("margin", float("nan"), "a number"),
        ("preference", 1.5, "a probability"),
    ):
        wrong = [Row(row | {column: value}, "pairs.jsonl:7")]
        message = f"pairs.jsonl:7: '{column}': wanted {wanted}, .*; got {value!r}"
        with pytest.raises(UserError, match=message):
            pair_examples(wrong, tiny_tokenizer(), 16, (column,))


def test_a_completion_without_tokens_is_no_pair():
    """A rejected completion that tokenizes to what the prompt ends in would have no length."""
    rows = [
        {"prompt": f"w1 {EOS}", "chosen": " w3", "rejected": " "},
        {"prompt": "w1", "chosen": " w3", "rejected": " w4"},
    ]
    got, ledger = pairs(rows)
    assert len(got) == 1
    assert (ledger.nothing_scored, ledger.prompt_fills_max_length) == (1, 0)


def test_a_conversation_without_an_answer_is_told_apart():
    rows = [[user("w1"), assistant("w2")], [user("w1")], [user("w1 " * 9), assistant("w2")]]
    rows = [Row({"messages": row}, "") for row in rows]
    tokenizer = tiny_tokenizer(chat_template=CHAT)
    got, ledger = sft_examples(rows, tokenizer, 8, assistant_only=True)
    assert len(got) == 1
    assert (ledger.nothing_scored, ledger.prompt_fills_max_length) == (1, 1)


def test_no_row_left():
    with pytest.raises(UserError, match="no row is left to train on: 0 of 1 rows kept"):
        pairs([{"prompt": "w1", "chosen": " w2", "rejected": " w2"}])


ROWS = [
    {"prompt": "w1, w2", "chosen": " w3\n007", "rejected": "nan"},
    {"prompt": 'a "quote"', "chosen": "None", "rejected": "\u00e9\U0001f600"},
]


def write(path, rows: list[dict]) -> None:
    """Rows as the file's name says."""
    if path.name.endswith(".csv") or path.name.endswith(".csv.gz"):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        text = "".join(json.dumps(row) + "\n\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()))
    else:
        write_rows(path, rows)


@pytest.mark.parametrize(
    "name, places",
    [
        ("r.jsonl", (":1", ":2")),
        ("r.jsonl.gz", (":1", ":3")),
        ("r.json", ("[0]", "[1]")),
        ("r.csv", (":3", ":4")),
        ("r.csv.gz", (":3", ":4")),
        ("r.parquet", ("[0]", "[1]")),
    ],
)
def test_files(tmp_path, name, places):
    """Every cell is the text that was written, and every row knows where it came from."""
    path = tmp_path / name
    write(path, ROWS)
    rows = load_rows(str(path))
    assert [row.columns for row in rows] == ROWS
    assert [row.where for row in rows] == [f"{path}{place}" for place in places]


def test_conversations_survive_parquet(tmp_path):
    row = {"chosen": [user("w1"), assistant("w2")], "rejected": [user("w1"), assistant("w3")]}
    write(tmp_path / "r.parquet", [row])
    assert load_rows(str(tmp_path / "r.parquet"))[0].columns == row


def test_a_folder_of_files(tmp_path):
    for name in ("b.jsonl", "a.csv"):
        write(tmp_path / name, ROWS)
    (tmp_path / "notes.txt").write_text("")
    rows = load_rows(str(tmp_path))
    places = [row.where.rsplit("/", 1)[1] for row in rows]
    assert places == ["a.csv:3", "a.csv:4", "b.jsonl:1", "b.jsonl:2"]
    assert set(FILE_KINDS.values()) == {"jsonl", "csv", "parquet"}


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert load_rows(str(tmp_path / "r.jsonl"))[0].columns == ROWS[0]


def test_common_prefix():
    a = np.array([1, 2, 3])
    for b, wanted in (([1, 2, 4], 2), ([1, 2], 2), ([], 0), ([2], 0), ([1, 2, 3, 4], 3)):
        assert common_prefix(a, np.array(b, dtype=np.int64)) == wanted
