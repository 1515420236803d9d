"""The thinking budget: when a trace has gone on long enough, and how it is ended.

The idea (report section 3.4). A response is a trace, `</think>`, an answer. With a budget of N tokens the trace may end
early: at the right moment `</think>` is fed to the model as if it had said so, and it goes on with the answer. The
model is never told N. The right moment is the end of a line, where a step is complete. How long to wait for a line's
end when none comes is where the three published rules differ; see `GRACE`.

Top to bottom: what a response is in the end (`Completion`), how long each rule waits (`GRACE`), and the budget as a
state machine fed one token at a time (`ThinkState`). It only says what must be fed next; whoever runs the model obeys.

Why this is written by hand, and what the library does better. A serving engine runs its rule as a logits processor
inside the step, for thousands of rows that come and go; the published client asks a server twice. Each knows one rule
and is tied to its host. This one needs a tokenizer only, knows all three, and can be stepped through.

This file knows text and token ids. It must not know models, batches or sampling.
"""

import codecs
import json
from bisect import bisect_left
from dataclasses import asdict, dataclass

TAG = b"</think>"


@dataclass
class Completion:
    """One response. `prompt`, `thought`, `answer` are text, the last two stripped; `ids` is all that came after the
    prompt, forced tokens and end of turn included.

    thinking_tokens: tokens that begin after the prompt's `<think>\\n` and before `</think>`; tokens that we put in to
    close the trace are not counted. answer_tokens: tokens that begin after `</think>` (with thinking off, all), the end
    of turn not counted. closed_by: who wrote `</think>`: "model"; "newline", the budget at a line's end; "forced", the
    budget anywhere else; "none", nobody: thinking was off, or the response ended inside its trace and has no answer.
    """

    prompt: str
    thought: str
    answer: str
    thinking_tokens: int
    answer_tokens: int
    closed_by: str
    ids: list[int]

    def to_json(self) -> str:
        """One line of JSON, without the ids."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "ids"}, ensure_ascii=False)


# How many tokens past the budget a rule waits for a newline before it closes the trace wherever it stands.
GRACE = {
    "report": lambda budget: 500,  # report section 3.4 and the model card's text
    "nim": lambda budget: budget // 10,  # NVIDIA NIM's logits processor
    "client": lambda budget: 0,  # the model card's example client: it cuts, and does not look for a newline
}


class ThinkState:
    """What one row has said so far, and when to close its trace: a state machine fed one token at a time.

        state = ThinkState(tokenizer, budget=200, rule="report")
        forced = state.start()          # before the first token
        forced = state.feed(token)      # after every token, forced ones included

    `forced` is None, or the list of tokens that must be fed next in place of what the model would choose.

    Everything is decided on decoded bytes, never on one id: `</think>` may be one token or three, its ">" may be glued
    to a newline, and a newline may sit inside a longer token. Tokens are counted from the first after `<think>\\n`.

    rule "report": once `budget` tokens are counted, close as soon as a token has a newline in it; without one, at
    budget + 500. "nim": the same with a wait of budget // 10. "client": exactly at the budget, with a full stop put in.
    With budget 0 the trace is closed before it begins (the newline of `<think>\\n` counts as its line's end).

    Corner cases. If the trace ends by itself first, nothing is forced. A second `</think>` is answer text. A newline
    inside a longer token closes after that token. A budget that ends inside a multi-byte character is still kept to the
    token; the half character is left out of `thought`. A budget that ends inside a `</think>` spelled with several
    tokens completes it instead of starting another (not by the rule "client", nor where the tag is one token: there
    what was begun stays text of the thought).

    Attributes: open (still thinking), closed_by, thinking_tokens, answer_tokens, thought, answer; see `Completion`.
    """

    def __init__(self, tokenizer, budget=None, rule="report", thinking=True):
        self.tokenizer, self.budget, self.rule = tokenizer, budget, rule
        self.open = thinking
        self.data = bytearray()  # all bytes said so far
        self.starts = []  # where in `data` each token begins
        self.closed_by, self.thinking_tokens = "none", 0
        self.closing = None  # "newline" or "forced" once we have begun to close
        self.thought_end = None if thinking else 0  # in `data`
        self.answer_start = None if thinking else 0

    def start(self):
        """To be called before the first token; returns as `feed`."""
        return self._check_budget(at_newline=True) if self.open else None

    def feed(self, token):
        """Take the next token of this row; return the tokens to force after it, or None."""
        piece = self.tokenizer.decode_bytes([token])
        self.starts.append(len(self.data))
        self.data += piece
        if not self.open:
            return None
        at = self.data.find(TAG, max(0, len(self.data) - len(piece) - len(TAG) + 1))
        if at >= 0:
            self._close(at)
            return None
        if self.closing:  # our own closing tokens are on their way
            return None
        self.thinking_tokens += 1
        return self._check_budget(at_newline=b"\n" in piece)

    def _check_budget(self, at_newline):
        if self.budget is None or self.thinking_tokens < self.budget:
            return None
        if at_newline and self.rule != "client":
            self.closing = "newline"
        elif self.thinking_tokens >= self.budget + GRACE[self.rule](self.budget):
            self.closing = "forced"
        else:
            return None
        self.thought_end = len(self.data)
        return self._closing_tokens()

    def _closing_tokens(self):
        """`</think>` on a line of its own, as every trace in training ends. The model card's client appends
        ".\\n</think>\\n\\n", but its chat template strips the end again: what the model sees stops at the tag."""
        encode, tag_id, tag = self.tokenizer.encode, self.tokenizer.end_think_id, TAG.decode()
        before, after = "" if self.data.endswith(b"\n") or not self.data else "\n", "\n"
        if self.rule == "client":
            before, after = ".\n", ""
        if tag_id is not None:
            return encode(before) + [tag_id] + encode(after)
        said = 0 if self.rule == "client" else unfinished_tag(self.data)
        self.thought_end -= said
        # encoded in one go: the released vocabulary glues the ">" to the newline
        return encode(tag[said:] + after if said else before + tag + after)

    def _close(self, at):
        """`</think>` stands at byte `at`."""
        self.open, self.answer_start = False, at + len(TAG)
        self.closed_by = self.closing or "model"
        begun_before = bisect_left(self.starts, at)
        self.thinking_tokens = min(self.thinking_tokens, begun_before) if self.closing else begun_before
        self.thought_end = min(self.thought_end, at) if self.closing else at

    @property
    def answer_tokens(self):
        return 0 if self.open else len(self.starts) - bisect_left(self.starts, self.answer_start)

    @property
    def thought(self):
        return _text(self.data[: self.thought_end]).strip()

    @property
    def answer(self):
        return "" if self.open else _text(self.data[self.answer_start :]).strip()

    def so_far(self):
        """(thought, answer) as they can be shown now: they only grow, so what may yet be `</think>` is held back."""
        end = len(self.data) - unfinished_tag(self.data) if self.thought_end is None else self.thought_end
        return _text(self.data[:end]).strip(), self.answer

    def completion(self, prompt, ids):
        """The response so far as a `Completion`; prompt is text, ids are all tokens after it."""
        counts = self.thinking_tokens, self.answer_tokens
        return Completion(prompt, self.thought, self.answer, *counts, self.closed_by, ids)


def unfinished_tag(data) -> int:
    """How many bytes of a `</think>` the end of `data` may be: 4 for b"so </th", 0 for b"so"."""
    return next((n for n in range(len(TAG) - 1, 0, -1) if data.endswith(TAG[:n])), 0)


def _text(data):
    """UTF-8 to str: a character cut off by the end is dropped, other bad bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(data))


def opens_thought(tokenizer, prompt) -> bool:
    """Whether a prompt of token ids ends with the template's open `<think>\\n`."""
    return tokenizer.decode_bytes(prompt[-8:]).endswith(b"<think>\n")
