"""A saved model's reward by its attention, or at the ends of steps."""

import math

import numpy as np
import pytest
import torch
import transformers
from tiny import byte_tokenizer, tiny_model, tiny_tokenizer, write_model
from torch.testing import assert_close

from prefuse.trainer.errors import UserError
from prefuse.trainer.feedback.credit import AttentionCredit, StepCredit, TokenCredit, steps_of
from prefuse.trainer.feedback.dense import on_tokens
from prefuse.trainer.reward_model import RewardModel
from prefuse.trainer.rewards import Feedback, Spans


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory) -> str:
    """A reward model of its own tokenizer."""
    tokenizer = byte_tokenizer(280)
    shape = tiny_model(vocab_size=len(tokenizer), pad_token_id=0).config
    shape.num_labels = 1
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(shape)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return write_model(tmp_path_factory.mktemp("judge"), model, tokenizer)


ASKED = ["the cat 😀", "on"]
ANSWERS = [" sat naïve\nthe 日本語 cat", " return é"]


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_attention_credit_by_hand(judge_folder, beta):
    """The model's own attentions [1, heads, L, L], last layer, last row; offsets by bytes."""
    tokenizer = byte_tokenizer(280)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        judge_folder, attn_implementation="eager"
    )
    found = AttentionCredit(judge_folder, beta=beta, batch_size=2)(ASKED, ANSWERS)
    whole = RewardModel(judge_folder)(ASKED, ANSWERS)
    for prompt, answer, spans, reward in zip(ASKED, ANSWERS, found, whole, strict=True):
        asked, said = (tokenizer(x)["input_ids"] for x in (prompt, answer))
        ids = torch.tensor([[*asked, *said, tokenizer.eos_token_id]])
        assert tokenizer(prompt + answer)["input_ids"] == [*asked, *said]
        with torch.no_grad():
            out = model(ids, output_attentions=True)
        row = out.attentions[-1][0, :, -1].mean(0)[len(asked) : -1]
        share = row / row.sum()
        assert isinstance(spans, Spans)
        ends, paid = zip(*spans.rewards, strict=True)
        assert ends[-1] == len(answer)
        pieces = [tokenizer.decode(said[:k]) for k in range(1, len(said) + 1)]
        whole_ends = [len(p) for p in pieces]  # a character that is cut shows as one
        assert list(ends) == whole_ends
        wanted = beta * share * out.logits[0, 0]
        wanted[-1] += (1 - beta) * out.logits[0, 0]
        assert_close(torch.tensor(paid), wanted, rtol=1e-4, atol=1e-6)
        assert_close(sum(paid), reward, rtol=1e-5, atol=1e-6)


def test_attention_credit_of_messages_and_of_nothing(judge_folder):
    """What the template adds gets no share; an empty text has the reward as one number."""
    tokenizer = byte_tokenizer(280)
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    asked, said = [{"role": "user", "content": "the cat"}], " sat on é "
    credit = AttentionCredit(judge_folder, tokenizer)
    (spans,) = credit([asked], [[{"role": "assistant", "content": said}]])
    (reward,) = RewardModel(judge_folder, tokenizer)(
        [asked], [[{"role": "assistant", "content": said}]]
    )
    assert isinstance(spans, Spans)
    ends = [end for end, _ in spans.rewards]
    assert min(ends) > 1 and max(ends) == len(said) - 1 and ends == sorted(ends)
    assert_close(sum(r for _, r in spans.rewards), reward, rtol=1e-5, atol=1e-6)
    assert isinstance(AttentionCredit(judge_folder)(["the"], [""])[0], float)


def test_every_token_is_paid_where_it_ends(judge_folder):
    """The end of the answer with its last character."""
    tokenizer, model = byte_tokenizer(280), RewardModel(judge_folder)
    found = TokenCredit(judge_folder, batch_size=1)(ASKED, ANSWERS)
    for spans, said, paid in zip(found, ANSWERS, model.tokens(ASKED, ANSWERS), strict=True):
        ids = tokenizer(said)["input_ids"]
        ends = [len(tokenizer.decode(ids[:k])) for k in range(1, len(ids) + 1)]
        assert isinstance(spans, Spans) and len(paid) == len(ids) + 1
        assert [end for end, _ in spans.rewards] == [*ends, len(said)]
        assert_close([r for _, r in spans.rewards], paid.double().tolist(), rtol=1e-4, atol=1e-6)
    (nothing,) = TokenCredit(judge_folder)(["the"], [""])
    assert_close(nothing, float(model.tokens(["the"], [""])[0].sum()))


def test_steps_are_paid_where_they_end(judge_folder):
    text = "the cat\n\nsat\non 😀"
    assert steps_of(text, "\n") == [("the cat", 8), ("sat", 13), ("on 😀", 17)]
    assert steps_of("", "\n") == steps_of("\n \n", "\n") == []
    (own,) = RewardModel(judge_folder).steps(["on"], [["the cat", "sat", "on 😀"]])
    for most, weight in ((1, 1 / 3), (2, 2 / 3), (math.inf, 1.0)):
        found = StepCredit(judge_folder, max_lines=most)(["on"] * 2, [text, "\n"])
        assert [end for end, _ in found[0].rewards] == [8, 13, 17] and not found[1].rewards
        assert_close([r for _, r in found[0].rewards], (own.double() * weight).tolist())
    asked = [{"role": "user", "content": "on"}]
    (said,) = StepCredit(judge_folder)([asked], [[{"role": "assistant", "content": text}]])
    assert said == StepCredit(judge_folder)(["on"], [text])[0]


@pytest.mark.parametrize(
    "spec, words",
    [
        ("?credit=attenton", "credit: wanted attention or steps or tokens"),
        ("?credit=attention&beta=2", r"beta: wanted a number in \[0, 1\]"),
        ("?credit=steps&max_lines=0", "max_lines: wanted a positive number"),
        ("?credit=steps&beta=1", "no such option 'beta'"),
        ("?beta=1", "no such option 'beta'"),
    ],
)
def test_wrong_options_are_told(judge_folder, spec, words):
    with pytest.raises(UserError, match=words):
        Feedback([judge_folder + spec])


def test_a_saved_model_pays_parts_of_other_tokens(judge_folder):
    """Through Feedback, onto tokens of the policy, which has one a word."""
    feedback = Feedback([f"{judge_folder}?credit=attention&beta=0.5"])
    tokenizer = tiny_tokenizer(words=["<pad>", "</s>", "<unk>", "the", "cat", "sat"])
    tokens = np.array([5, 3, 4, 1])
    scores = feedback(["on "], ["sat the cat"], [tokens.tolist()], {}, ["row 1"])
    paid = on_tokens(scores.dense[0, 0], tokens, tokenizer)
    assert (paid[:3] != 0).all() and paid[3] == 0
    (reward,) = RewardModel(judge_folder)(["on "], ["sat the cat"])
    assert_close([paid.sum(), scores.rewards[0, 0]], [reward] * 2, rtol=1e-5, atol=1e-6)
