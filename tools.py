"""A database to call tools on: requests, reference solutions, and a checker that looks at the records afterwards.

The idea. Whether a model can use tools is not seen in what it says but in what it leaves behind. Here is a world small
enough to check everything: a few records, a key (`a3`) and a value (10 to 99) each, which the model cannot see. It is
told which tools there are, is asked for something, writes calls, reads what comes back, and ends with an answer:

    System     <AVAILABLE_TOOLS>["get key", "delete key", "set key value"]</AVAILABLE_TOOLS>
    User       Move a3 to k7.
    Assistant  <TOOLCALL>[{"name": "get", "arguments": {"key": "a3"}}]</TOOLCALL>
    User       <TOOL_RESPONSE>[41]</TOOL_RESPONSE>
    Assistant  <TOOLCALL>[{"name": "set", "arguments": {"key": "k7", "value": 41}}]</TOOLCALL>
    User       <TOOL_RESPONSE>["ok"]</TOOL_RESPONSE>
    ...
    Assistant  done

An episode counts (`Play.success`) if the records and the answer are the reference's; the way there is free. Requests
that a guess could satisfy ask for the value as well. Two kinds ask for restraint: in `lacking` one needed tool is not
offered, and the answer names it ("cannot: delete") without a call; in `unrelated` the question needs no tool at all.
In `limit` the first result decides whether there is a second call.

The layout of calls and results is the chat template's (template.py), so a conversation played here is rendered like any
other. The list of tools is ours: a name and its arguments, since JSON schemas and the template's two sentences are 250
tokens in a vocabulary of 512 entries and would say no more. Tags and JSON are ordinary text.

Whether a request is "train" or "test" is decided by a hash of its text, as in tasks.py. This file must not know tokens
or models. Sources: the report keeps the tool conversations that a rule verifies, and tunes with WorkBench (Styles et
al. 2024), whose checker looks at a database's state too; cases of restraint follow When2Call, which is in its data.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

import tasks

TOOLS = {
    "get": ("key",),
    "set": ("key", "value"),
    "delete": ("key",),
    "count": ("letter",),
    "list": ("letter",),
}
OPEN, CLOSE = "<TOOLCALL>", "</TOOLCALL>"
MOST_TURNS = 6  # of the assistant; the longest reference has 4


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: its thought, and either calls [(name, arguments)] or, if there are none, an answer."""

    trace: str
    calls: tuple = ()
    answer: str = ""

    @property
    def text(self):
        """What the assistant writes after its thought; the same that template.py makes of `tool_calls`."""
        if not self.calls:
            return self.answer
        return OPEN + json.dumps([{"name": name, "arguments": arguments} for name, arguments in self.calls]) + CLOSE


@dataclass(frozen=True)
class Episode:
    """A request, the records before and after, and a reference solution whose last turn is the answer."""

    kind: str
    tools: tuple[str, ...]
    records: dict[str, int]
    request: str
    turns: tuple[Turn, ...]
    final: dict[str, int]

    @property
    def answer(self):
        return self.turns[-1].answer

    def messages(self):
        """The conversation before the assistant's first turn."""
        offered = json.dumps([" ".join((name, *TOOLS[name])) for name in self.tools])
        system = f"<AVAILABLE_TOOLS>{offered}</AVAILABLE_TOOLS>"
        return [{"role": "system", "content": system}, {"role": "user", "content": self.request}]


# ----------------------------------------------------------------------------------------------------------------------
# The database


def run_tool(records, name, arguments):
    """Do one call on `records` (changed in place); returns what JSON can hold. ValueError, in words, for a bad call."""
    if name not in TOOLS:
        raise ValueError(f"no tool {name}")
    if not isinstance(arguments, dict) or set(arguments) != set(TOOLS[name]):
        raise ValueError(f"{name} takes {', '.join(TOOLS[name])}")
    subject = arguments[TOOLS[name][0]]
    if not isinstance(subject, str):
        raise ValueError(f"{TOOLS[name][0]} must be text")
    if name in ("count", "list"):
        found = sorted(key for key in records if key.startswith(subject))
        return len(found) if name == "count" else found
    if name == "get":
        return records.get(subject)
    if name == "set":
        if type(arguments["value"]) is not int:
            raise ValueError("value must be a whole number")
        records[subject] = arguments["value"]
        return "ok"
    return "ok" if records.pop(subject, None) is not None else None


def run_call(records, text, offered=tuple(TOOLS)):
    """Do the calls in what an assistant wrote, `...<TOOLCALL>[...]</TOOLCALL>`; records change in place.

    Returns the results as JSON texts, one a call, for messages with role tool; a call that cannot be done gives an
    error for the model to read and changes nothing. Nothing that the model writes is ever executed but these five
    tools. Text that holds no list of calls gives one error.
    """
    body = text.partition(OPEN)[2].partition(CLOSE)[0]
    try:
        calls = json.loads(body)
        if not isinstance(calls, list) or not calls or CLOSE not in text:
            raise ValueError
    except (ValueError, RecursionError):
        return [json.dumps("error: not a list of calls")]
    results = []
    for call in calls:
        try:
            if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
                raise ValueError("a call has a name and arguments")
            if call["name"] not in offered:
                raise ValueError(f"no tool {call['name']}")
            results.append(json.dumps(run_tool(records, call["name"], call["arguments"])))
        except (ValueError, TypeError) as error:
            results.append(json.dumps(f"error: {error}"))
    return results


class Play:
    """An episode being played: `messages` so far, `records` as they are now, and the `answer` once there is one.

    play = Play(episode)
    while not play.done:
        play.say(what the model writes after its thought, given play.messages)
    play.success()
    """

    def __init__(self, episode):
        self.episode, self.records = episode, dict(episode.records)
        self.messages, self.answer, self.calls, self.turns = episode.messages(), None, 0, 0

    @property
    def done(self):
        return self.answer is not None or self.turns == MOST_TURNS

    def say(self, text):
        """Take one turn of the assistant: calls are done and answered, anything else ends the episode."""
        self.turns += 1
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        if OPEN not in text:
            self.answer = text
            return
        results = run_call(self.records, text, self.episode.tools)
        self.calls += len(results)
        self.messages = [*self.messages, *({"role": "tool", "content": result} for result in results)]

    def success(self):
        """True if the records and the answer are the reference's, and no tool was called where none was needed."""
        episode = self.episode
        needless = self.calls > 0 and len(episode.turns) == 1
        answered = self.answer is not None and self.answer.split() == episode.answer.split()
        return answered and not needless and self.records == episode.final


def replay(episode, upto=None):
    """The play after the first `upto` turns of the reference (None: all of them)."""
    play = Play(episode)
    for turn in episode.turns[:upto]:
        play.say(turn.text)
    return play


# ----------------------------------------------------------------------------------------------------------------------
# Requests: each maker returns what `_solve` does; `have` are keys with a record, `free` keys without

get = lambda key: ("get", {"key": key})
put = lambda key, value: ("set", {"key": key, "value": value})
drop = lambda key: ("delete", {"key": key})


def _solve(records, request, *steps, answer, before=None, needed=None):
    """(request, turns, needed tools) from lists of calls and the answer behind them.

    A thought repeats the request, then says what is known and what follows: before the first calls the tools that it
    takes, later the records that were read, then `before` ({number of a turn: a line}), then the calls or the answer.
    """
    needed = needed or tuple(dict.fromkeys(name for calls in steps for name, _ in calls))
    turns, last = [], []
    for i, calls in enumerate([*steps, ()]):
        lines = [f"takes {' '.join(needed)}"] if i == 0 else []
        lines += [
            f"{arguments['key']} = {records.get(arguments['key'], 'none')}" for name, arguments in last if name == "get"
        ]
        lines += [before[i]] if before and i in before else []
        lines += [" ".join([name, *map(str, arguments.values())]) for name, arguments in calls] or [str(answer)]
        thought = "\n".join([request, *(f"- {line}" for line in lines)])
        turns.append(Turn(thought, tuple(calls), "" if calls else str(answer)))
        last = calls
    return request, tuple(turns), needed


def _look(rng, records, have, free):
    key = rng.choice(free if rng.random() < 0.25 else have)
    return _solve(records, f"What is {key}?", [get(key)], answer=records.get(key, "none"))


def _put(rng, records, have, free):
    key, value = rng.choice(have + free), rng.randint(10, 99)
    return _solve(records, f"Set {key} to {value}.", [put(key, value)], answer="done")


def _drop(rng, records, have, free):
    key = rng.choice(have)
    return _solve(records, f"Delete {key}.", [drop(key)], answer="done")


def _count(rng, records, have, free):
    letter = rng.choice(have)[0]
    n = sum(key[0] == letter for key in records)
    return _solve(records, f"How many keys start with {letter}?", [("count", {"letter": letter})], answer=n)


def _list(rng, records, have, free):
    letter = rng.choice(have)[0]
    found = " ".join(sorted(key for key in records if key[0] == letter))
    return _solve(records, f"Which keys start with {letter}?", [("list", {"letter": letter})], answer=found)


def _greater(rng, records, have, free):
    a, b = rng.sample(have, 2)
    best = max(a, b, key=records.get)
    answer = f"{best} {records[best]}"
    return _solve(records, f"Which is greater, {a} or {b}?", [get(a), get(b)], answer=answer)


def _copy(rng, records, have, free):
    a, b = rng.choice(have), rng.choice(free)
    return _solve(records, f"Copy {a} to {b}.", [get(a)], [put(b, records[a])], answer="done")


def _raise(rng, records, have, free):
    """The sum is worked out the way tasks.py's stories do it, and stays below 100."""
    key = rng.choice([k for k in have if records[k] < 99])
    k = rng.randint(1, min(9, 99 - records[key]))
    total, unit = records[key] + k, records[key] % 10
    sums = f"{records[key]}+{k}: {unit}+{k}={unit + k:02d} -> {total}"
    return _solve(records, f"Add {k} to {key}.", [get(key)], [put(key, total)], answer=total, before={1: sums})


def _limit(rng, records, have, free):
    key, limit = rng.choice(have), rng.randrange(20, 90, 10)
    value, request, needed = records[key], f"Delete {key} if it is above {limit}.", ("get", "delete")
    above = value > limit
    return _solve(
        records, request, [get(key)], *[[drop(key)]] * above, answer=f"{'deleted' if above else 'kept'} {value}",
        before={1: f"{value} {'>' if above else '<='} {limit}"}, needed=needed,
    )  # fmt: skip


def _move(rng, records, have, free):
    a, b = rng.choice(have), rng.choice(free)
    return _solve(records, f"Move {a} to {b}.", [get(a)], [put(b, records[a])], [drop(a)], answer="done")


def _swap(rng, records, have, free):
    a, b = rng.sample(have, 2)
    crossed = [put(a, records[b]), put(b, records[a])]
    return _solve(records, f"Swap {a} and {b}.", [get(a), get(b)], crossed, answer="done")


REQUESTS: dict[str, Callable] = {
    "look": _look, "put": _put, "drop": _drop, "count": _count, "list": _list, "greater": _greater,
    "copy": _copy, "raise": _raise, "limit": _limit, "move": _move, "swap": _swap,
}  # fmt: skip
KINDS = (*REQUESTS, "lacking", "unrelated")
SEVERAL = ("copy", "raise", "limit", "move", "swap")  # a result decides the next call


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def split_of(request):
    """Returns "train" or "test", decided by the request alone; one in tasks.TEST_SHARE is "test"."""
    digest = blake2b(f"tools\n{request}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % tasks.TEST_SHARE == 0 else "train"


def sample(kind: str, rng: Random, split: str = "train") -> Episode:
    """One episode of one kind, drawn until its request falls in the split. ValueError for an unknown kind or split."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of tool request {kind!r}: choose one of {', '.join(KINDS)}")
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    while True:
        letters = rng.sample(tasks.LETTERS, 4)  # few letters, so that several keys share one
        keys = rng.sample([a + d for a in letters for d in "0123456789"], 10)
        have, free = keys[:6], keys[6:]
        records = dict(zip(have, rng.sample(range(10, 100), 6)))
        if kind == "unrelated":
            task = tasks.sample(rng.choice(("add", "reverse", "sort", "word")), 1, rng, split)
            request, turns, needed = task.question, (Turn(task.trace, answer=task.answer),), ()
        else:
            make = rng.choice(list(REQUESTS)) if kind == "lacking" else kind
            request, turns, needed = REQUESTS[make](rng, records, have, free)
            if split_of(request) != split:
                continue
        others = [name for name in TOOLS if name not in needed]
        offered = [*needed, *rng.sample(others, rng.randint(min(1, len(others)), min(3, len(others))))]
        if kind == "lacking":
            gone = rng.choice(needed)
            offered.remove(gone)
            known = turns[0].trace.split("\n")[:2]  # the request and the tools it takes
            turns = (Turn("\n".join([*known, f"- no {gone}"]), answer=f"cannot: {gone}"),)
        offered = sorted(offered)
        rng.shuffle(offered)
        final = dict(records)
        for turn in turns:
            for name, arguments in turn.calls:
                run_tool(final, name, arguments)
        return Episode(kind, tuple(offered), records, request, turns, final)


def draw(rng: Random, split: str = "train", kinds=KINDS) -> Episode:
    """One episode of a kind drawn at random."""
    return sample(rng.choice(kinds), rng, split)
