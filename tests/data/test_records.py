"""How a record becomes a prompt."""

from __future__ import annotations

import pytest

from megatron_dlm.config.errors import DataError
from megatron_dlm.data.records import check_messages, content_key, fill_template, prompt_of


class Letters:
    """Stands in for a tokenizer: one id per character; the chat template writes roles in front of turns."""

    mask_id = 0
    response_prefix = ""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages):
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")


def test_key_depends_on_the_text_alone():
    assert content_key("a b") == content_key(" a \n b ") != content_key("a c")
    assert content_key("ab", "c") != content_key("a", "bc")


def test_key_is_the_same_on_every_machine():
    assert (
        content_key("1+1=") == "9293c683c3b749bdf1ffce7085bd9f2c"
    )  # a change here changes the draws of every recorded run


def test_template_keeps_other_braces():
    assert fill_template("{question} in \\boxed{}.", "1+1 {x}") == "1+1 {x} in \\boxed{}."
    with pytest.raises(DataError, match="no place for the question"):
        fill_template("solve it", "1+1")


@pytest.mark.parametrize(
    ("record", "chat", "text"),
    [
        ({"question": "q"}, False, "Q: q"),
        ({"question": "q"}, True, "<user>Q: q<assistant>"),
        ({"prompt": "p"}, True, "p"),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            False,
            "<system>s<user>u<assistant>",
        ),
    ],
)
def test_three_ways_to_write_a_prompt(record, chat, text):
    _, ids = prompt_of(record, "f, line 1", Letters(), "Q: {question}", chat)
    assert "".join(map(chr, ids)) == text


@pytest.mark.parametrize("messages", [None, [], ["hi"], [{"role": "user"}], [{"role": "user", "content": ["x"]}]])
def test_bad_messages(messages):
    with pytest.raises(DataError, match="^f, line 3: .*'messages'"):
        check_messages(messages, "f, line 3")


def test_no_prompt_at_all():
    with pytest.raises(DataError, match="^f, line 3: no prompt .*answer"):
        prompt_of({"answer": "1"}, "f, line 3", Letters(), "{question}", False)


@pytest.mark.parametrize("field", ["question", "prompt"])
def test_a_prompt_that_spells_the_mask_is_refused(field):
    with pytest.raises(DataError, match=r"p.jsonl, line 3: the prompt holds the mask token itself \(id 0\)"):
        prompt_of({field: "1\0+1="}, "p.jsonl, line 3", Letters(), "{question}", False)
