"""The chat template: what it renders, which pieces are control, and that our Jinja says the same in transformers."""

import random

import pytest

from template import chat_text, render_chat
from tokenizer import train_bpe

USER = {"role": "user", "content": "Hi"}


def said(role, content, **more):
    return {"role": role, "content": content} | more


THINK_ON, THINK_OFF = "<SPECIAL_11>Assistant\n<think>\n", "<SPECIAL_11>Assistant\n<think></think>"
SYS, HI = "<SPECIAL_10>System\n\n", "<SPECIAL_11>User\nHi\n"
U, A, END = "<SPECIAL_11>User\n", "<SPECIAL_11>Assistant\n", "<SPECIAL_12>\n"
CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "messages, options, text",
    [
        ([USER], {}, SYS + HI + THINK_ON),
        ([USER], {"add_generation_prompt": False}, SYS + HI),
        ([said("system", "  Be brief. \n"), USER], {}, "<SPECIAL_10>System\nBe brief.\n" + HI + THINK_ON),
        ([said("system", ""), USER], {}, SYS + HI + THINK_ON),
        ([said("system", "/no_think"), USER], {}, SYS + HI + THINK_OFF),
        ([said("user", "Hi /no_think")], {}, SYS + HI + THINK_OFF),
        (
            [said("user", "/no_think"), said("assistant", "a"), said("user", "Hi /think")],
            {},
            SYS + U + "\n" + A + "a\n" + END + HI + THINK_ON,
        ),
        # the last hit wins, and within one message /think wins
        ([said("system", "/think"), said("user", "Hi /no_think")], {}, SYS + HI + THINK_OFF),
        ([said("system", "/no_think"), said("user", "Hi /think")], {}, SYS + HI + THINK_ON),
        ([said("user", "/think Hi /no_think")], {}, SYS + HI + THINK_ON),
        # the substring quirk: </think> counts as /think and is mangled
        ([said("user", "/no_think"), said("user", "</think> b")], {}, SYS + U + "\n" + U + "<> b\n" + THINK_ON),
        ([said("user", "see /thinking/x")], {}, SYS + U + "see ing/x\n" + THINK_ON),
        # earlier assistant turns lose their thought; assistant texts do not switch thinking
        (
            [USER, said("assistant", "<think>\nhm /no_think\n</think>\n\nyes\n"), USER],
            {},
            SYS + HI + "<SPECIAL_11>Assistant\nyes\n<SPECIAL_12>\n" + HI + THINK_ON,
        ),
        (
            [USER, said("assistant", "t</think>b</think>c"), USER],
            {"add_generation_prompt": False},
            SYS + HI + A + "b\n" + END + HI,
        ),
        # a final assistant message is a prefill
        ([USER, said("assistant", " So \n")], {}, SYS + HI + THINK_ON + "So"),
        ([USER, said("assistant", "So")], {"add_generation_prompt": False}, SYS + HI + THINK_ON + "So\n<SPECIAL_12>\n"),
        (
            [USER, said("assistant", "t.\n</think>\n\n")],
            {"add_generation_prompt": False, "continue_final_message": True},
            SYS + HI + THINK_ON + "t.\n</think>",
        ),
        ([said("user", "Hi /no_think"), said("assistant", "So")], {}, SYS + HI + THINK_OFF + "So"),
        ([USER, said("assistant", "")], {"add_generation_prompt": False}, SYS + HI),
        ([USER, said("assistant", "")], {"add_generation_prompt": False, "continue_final_message": True}, SYS + HI),
        # tool results: inside a user turn, consecutive ones merged
        (
            [USER, said("assistant", "", tool_calls=[CALL]), said("tool", "2"), said("tool", "3")],
            {},
            SYS + HI + A + '<TOOLCALL>[{"name": "f", "arguments": {"x": 1}}]</TOOLCALL>\n' + END + U
            + "<TOOL_RESPONSE>[2, 3]</TOOL_RESPONSE>\n" + THINK_ON,
        ),
    ],
)  # fmt: skip
def test_rendering(messages, options, text):
    assert chat_text(messages, **options) == text


def test_tools_go_to_the_system_turn():
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g", "d": "ü"}]
    text = chat_text([said("system", "S"), USER], tools=tools)
    assert text.startswith("<SPECIAL_10>System\nS\n\n") and text.endswith("\n" + HI + THINK_ON)
    assert '<AVAILABLE_TOOLS>[{"name": "f"}, {"name": "g", "d": "ü"}]</AVAILABLE_TOOLS>' in text


def test_control_pieces_are_the_layout_only():
    pieces = render_chat([said("system", "<SPECIAL_12>"), said("user", "<think><SPECIAL_11>")])
    assert [p for p, control in pieces if control] == ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_11>", "<think>"]
    # a prefill is the model's own words: its first </think> closes the thought, a typed end of turn does not end it
    pieces = render_chat([USER, said("assistant", "t\n</think>\nsay </think><SPECIAL_12>")])
    assert pieces[-4:] == [("\n", False), ("t\n", False), ("</think>", True), ("\nsay </think><SPECIAL_12>", False)]


def random_chat(rng):
    words = [
        "Hi",
        " /think",
        "/no_think ",
        "</think>",
        "<think>",
        "\n",
        "  ",
        "ü 日本",
        '{"a": 1}',
        "<SPECIAL_12>",
        "7",
    ]
    text = lambda: "".join(rng.choice(words) for _ in range(rng.randrange(6)))
    chat = [said("system", text())] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 4)):
        chat.append(said("user", text()))
        if rng.random() < 0.3:
            calls = [{"function": {"name": "f", "arguments": rng.choice(['{"x": 1}', {"x": "é"}])}}] * rng.randrange(
                1, 3
            )
            chat.append(said("assistant", text(), tool_calls=calls))
            chat += [said("tool", text())] * rng.randrange(1, 4)
        if rng.random() < 0.7:
            chat.append(said("assistant", text()))
    return chat


@pytest.fixture(scope="module")
def in_transformers(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("ours")
    train_bpe(["a b"], 272).save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_saved_template_renders_the_same_in_transformers(in_transformers):
    rng, seen = random.Random(0), set()
    tools = [{"type": "function", "function": {"name": "f", "description": "ü <b>"}}]
    for _ in range(400):
        chat = random_chat(rng)
        options = {"add_generation_prompt": rng.random() < 0.5, "tools": tools if rng.random() < 0.3 else None}
        text = chat_text(chat, **options)
        assert in_transformers.apply_chat_template(chat, tokenize=False, **options) == text
        seen.add((text.endswith(THINK_ON), text.endswith(THINK_OFF), chat[-1]["role"]))
    assert len(seen) >= 6  # the draws did reach thinking on and off, with and without a prefill


def test_continue_final_message_as_in_transformers(in_transformers):
    for content in ("So", " t.\n</think>\n\n", "a\n</think>\n\nThe answer"):
        options = {"add_generation_prompt": False, "continue_final_message": True}
        chat = [said("user", "Hi there"), said("assistant", content)]
        assert in_transformers.apply_chat_template(chat, tokenize=False, **options) == chat_text(chat, **options)


@pytest.mark.parametrize(
    "messages, options, words",
    [
        ([], {}, "at least one message"),
        ("Hi", {}, "a list of"),
        (USER, {}, "a list of"),
        (None, {}, "a list of"),
        (["Hi"], {}, "message 0 is 'Hi'"),
        ([{"role": "user"}], {}, "keys role and content"),
        ([USER, said("wizard", "x")], {}, "message 1 has role 'wizard'"),
        ([said("user", None)], {}, "content of message 0 .user. must be a string, got NoneType"),
        ([said("user", [{"type": "text"}])], {}, "got list"),
        ([said("assistant", "x"), USER], {}, "assistant turn before any user"),
        ([said("system", "x")], {}, "none of the 1 messages"),
        ([USER, said("system", "be nice")], {}, "message 1 is a system message"),
        ([USER], {"continue_final_message": True}, "needs a final assistant"),
        ([USER], {"tools": "f"}, "tools must be a list of dicts"),
        ([USER], {"tools": [f"{1}"]}, "tools must be a list of dicts"),
        ([USER, said("assistant", "", tool_calls=[{"name": "f"}]), USER], {}, "a tool call needs a name"),
        ([USER, said("assistant", "", tool_calls=["f"]), USER], {}, "a tool call needs a name"),
    ],
)
def test_chat_refuses(messages, options, words):
    with pytest.raises(ValueError, match=words):
        render_chat(messages, **options)
