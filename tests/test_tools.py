"""The database: every reference solution passes, what is spoiled fails, nothing that a model writes does harm."""

import json
from dataclasses import replace
from random import Random

import pytest

import tools
from template import chat_text
from tools import CLOSE, OPEN, Play, replay, run_call


def episodes(count=40, split="train", kinds=tools.KINDS):
    return [tools.sample(kind, Random(f"{kind} {i}"), split) for kind in kinds for i in range(count)]


def call(name, **arguments):
    return OPEN + json.dumps([{"name": name, "arguments": arguments}]) + CLOSE


# ----------------------------------------------------------------------------------------------------------------------
# References


def test_every_reference_solution_passes():
    for episode in episodes():
        play = replay(episode)
        assert play.done and play.success(), episode
        assert play.turns == len(episode.turns) <= tools.MOST_TURNS
        assert not any("error" in m["content"] for m in play.messages), episode


def test_no_half_of_a_solution_passes():
    """Without its last turn an episode has no answer; with the answer alone it fails wherever calls change anything."""
    for episode in episodes(20):
        assert not replay(episode, len(episode.turns) - 1).success()
        if episode.final != episode.records:
            lazy = Play(episode)
            lazy.say(episode.answer)
            assert lazy.done and not lazy.success()


def test_a_spoiled_solution_fails():
    for episode in episodes(20):
        play = replay(episode, len(episode.turns) - 1)
        play.say(episode.answer + " x")
        assert not play.success()
        for i, turn in enumerate(episode.turns):
            for name, arguments in turn.calls:
                if name not in ("set", "delete"):
                    continue
                other = [(name, arguments | {"key": "zz"})]
                spoiled = (*episode.turns[:i], replace(turn, calls=tuple(other)), *episode.turns[i + 1 :])
                assert not replay(replace(episode, turns=spoiled)).success(), episode


def test_a_call_too_many_fails_where_none_is_needed_and_is_forgiven_elsewhere():
    for episode in episodes(10, kinds=("lacking", "unrelated", "look")):
        play = Play(episode)
        play.say(call("count", letter="a"))
        for turn in episode.turns:
            play.say(turn.text)
        assert play.success() == (episode.kind == "look")


def test_records_that_were_not_to_be_touched_are_looked_at():
    episode = tools.sample("look", Random(0))
    play = Play(replace(episode, tools=tuple(tools.TOOLS)))
    play.say(call("delete", key=next(iter(episode.records))))
    play.say(episode.answer)
    assert not play.success()


def test_values_are_hidden_and_tools_that_are_needed_are_offered():
    for episode in episodes(20):
        shown = " ".join(m["content"] for m in episode.messages())
        assert not any(f"{k}={v}" in shown for k, v in episode.records.items())
        needed = {name for turn in episode.turns for name, _ in turn.calls}
        assert needed <= set(episode.tools) and len(set(episode.tools)) == len(episode.tools)
        if episode.kind == "lacking":
            assert episode.answer.split()[1] not in episode.tools
            assert len(episode.turns) == 1 and episode.final == episode.records


def test_whether_a_tool_is_lacking_does_not_hang_on_what_cannot_be_seen():
    """`limit` may or may not come to delete: both tools are offered, or the one that is not is named."""
    for i in range(200):
        episode = tools.sample("limit", Random(i))
        assert {"get", "delete"} <= set(episode.tools)
        assert episode.turns[0].trace.split("\n")[1] == "- takes get delete"


def test_chains_need_what_an_earlier_call_returned():
    for episode in episodes(10, kinds=("copy", "raise", "move", "swap")):
        assert sum(bool(turn.calls) for turn in episode.turns) >= 2


# ----------------------------------------------------------------------------------------------------------------------
# Calls


def test_the_five_tools():
    records = {"a1": 10, "a2": 20, "b1": 30}
    assert run_call(records, call("get", key="a1")) == ["10"]
    assert run_call(records, call("get", key="c1")) == ["null"]
    assert run_call(records, call("count", letter="a")) == ["2"]
    assert run_call(records, call("list", letter="a")) == ['["a1", "a2"]']
    assert run_call(records, call("set", key="c1", value=40)) == ['"ok"'] and records["c1"] == 40
    assert run_call(records, call("delete", key="a1")) == ['"ok"'] and "a1" not in records
    assert run_call(records, call("delete", key="a1")) == ["null"]
    two = OPEN + '[{"name": "get", "arguments": {"key": "a2"}}, {"name": "nope", "arguments": {}}]' + CLOSE
    assert run_call(records, f"so: {two} and more") == ["20", '"error: no tool nope"']


@pytest.mark.parametrize(
    "text",
    [
        OPEN, OPEN + CLOSE, OPEN + "[]" + CLOSE, OPEN + "{}" + CLOSE, OPEN + "[1]" + CLOSE, OPEN + "[[]]" + CLOSE,
        OPEN + '[{"name": "get"}]' + CLOSE, OPEN + '[{"name": ["get"], "arguments": {}}]' + CLOSE,
        OPEN + '[{"name": "get", "arguments": {"key": "a1"}}]', OPEN + "[" * 100_000 + CLOSE,
        call("get"), call("get", key=1), call("get", key=["a1"]), call("get", key="a1", value=2), call("set", key="a1"),
        call("set", key="a1", value="5"), call("set", key="a1", value=True), call("set", key="a1", value=1.5),
        OPEN + '[{"name": "get", "arguments": "key"}]' + CLOSE, OPEN + '[{"name": "get", "arguments": null}]' + CLOSE,
        OPEN + '[{"name": "__import__", "arguments": {"key": "os"}}]' + CLOSE, OPEN + "\ud800" + CLOSE,
    ],
)  # fmt: skip
def test_a_bad_call_is_told_and_changes_nothing(text):
    records = {"a1": 10}
    results = run_call(records, text)
    assert records == {"a1": 10} and len(results) == 1
    assert json.loads(results[0]).startswith("error: ")


def test_a_tool_that_is_not_offered_cannot_be_called():
    episode = replace(tools.sample("drop", Random(0)), tools=("get",))
    assert not replay(episode).success()
    assert "no tool delete" in replay(episode, 1).messages[-1]["content"]


def test_a_play_ends_after_its_most_turns():
    play = Play(tools.sample("look", Random(0)))
    for _ in range(tools.MOST_TURNS):
        assert not play.done
        play.say(call("get", key="a1"))
    assert play.done and play.answer is None and not play.success()


# ----------------------------------------------------------------------------------------------------------------------
# Layout and split


def test_a_call_is_written_as_the_template_writes_tool_calls():
    episode = next(e for e in episodes(5, kinds=("swap",)))
    turn = episode.turns[0]
    said = replay(episode, 1).messages
    as_calls = [{"name": name, "arguments": arguments} for name, arguments in turn.calls]
    template_own = [*said[:2], {"role": "assistant", "content": "", "tool_calls": as_calls}, *said[3:]]
    assert chat_text(said) == chat_text(template_own)
    assert "<TOOL_RESPONSE>[" in chat_text(said) and chat_text(said).count("<TOOL_RESPONSE>") == 1


def test_train_and_test_share_no_request():
    seen = {split: {e.request for e in episodes(60, split)} for split in ("train", "test")}
    assert not seen["train"] & seen["test"]
    assert all(tools.split_of(e.request) == "test" for e in episodes(5, "test") if e.kind != "unrelated")


def test_an_episode_depends_on_the_seed_alone_and_bad_values_are_refused():
    assert tools.draw(Random(3)) == tools.draw(Random(3)) != tools.draw(Random(4))
    with pytest.raises(ValueError, match="unknown kind of tool request 'nope'"):
        tools.sample("nope", Random(0))
    with pytest.raises(ValueError, match="split must be"):
        tools.sample("look", Random(0), "dev")
