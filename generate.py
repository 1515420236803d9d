"""From a prompt to an answer: prefill, cached steps, sampling, stop rules, the thinking budget, and a terminal chat.

The idea. A prompt is read in one call (prefill), which fills the cache: a fixed-size state for each Mamba layer, keys
and values for each attention layer. Then every step feeds one token a row and reads the logits of the next. A response:

    prompt ... <think>\\n   trace \\n</think>\\n   answer \\n<SPECIAL_12>      thinking on
    prompt ... <think></think>                  answer \\n<SPECIAL_12>      thinking off

and the *thinking budget* (report section 3.4) may end the trace early: at the right moment `</think>` is fed to the
model as if it had said so, and it goes on with the answer. The model is never told the number.

Top to bottom: what comes out (`Completion`), the budget as a state machine fed one token at a time (`ThinkState`), the
choice of a token (`sample`), the loop (`generate`), conversations (`complete_chat`, `answer`), the script.

    python generate.py "What is 47 + 85?"          one question, or several
    python generate.py                             a chat in the terminal
    python generate.py --json --file questions.txt  one JSON object a line

Why this is written by hand and what the library does better. A serving engine (vLLM, TensorRT-LLM, NIM) lets new rows
join while others run, pages its caches and captures the step in a graph; transformers' `generate` has thirty more ways
to choose a token. Here the loop is forty lines that one can step through. This file must not know training.
"""

import argparse
import codecs
import json
import math
import os
import sys
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import torch

from checkpoint import load_pretrained
from model import memory_bytes

TAG = b"</think>"
PREFILL = 1024  # prompt positions read in one call: bounds the (row, position, position) mask of a padded batch
ROWS = {"cpu": 64, "cuda": 512}  # rows in one batch; on a CPU more are slower, once their states outgrow its caches
SHRINK = 0.75  # finished rows are dropped from the batch when at most this share of it is still running


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


# ----------------------------------------------------------------------------------------------------------------------
# The thinking budget

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
    tokens completes it instead of starting another.

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


def unfinished_tag(data) -> int:
    """How many bytes of a `</think>` the end of `data` may be: 4 for b"so </th", 0 for b"so"."""
    return next((n for n in range(len(TAG) - 1, 0, -1) if data.endswith(TAG[:n])), 0)


def _text(data):
    """UTF-8 to str: a character cut off by the end is dropped, other bad bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(data))


def opens_thought(tokenizer, prompt) -> bool:
    """Whether a prompt of token ids ends with the template's open `<think>\\n`."""
    return tokenizer.decode_bytes(prompt[-8:]).endswith(b"<think>\n")


# ----------------------------------------------------------------------------------------------------------------------
# Choosing a token


def sample(logits, temperature, top_p, u):
    """One token id a row from logits (b, vocab): the most likely if temperature is 0, else drawn with u (b,) in [0, 1).

    top_p (Holtzman et al. 2019, nucleus sampling): keep the most likely tokens until their mass reaches top_p. The draw
    is by inverse transform: lay the kept probabilities side by side and see in which one u falls. All randomness is
    in `u`, so a row's draw does not depend on its neighbours. The side-by-side order is the vocabulary's, not that of
    the sorted probabilities, so rounding differences between batch sizes move borders by a hair and never swap tokens.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ordered, index = p.sort(stable=True, dim=-1, descending=True)
        keep = ordered.cumsum(-1) - ordered < top_p  # a token stays if those before it have not reached top_p
        p = p * torch.zeros_like(keep).scatter(-1, index, keep)
    edges = p.cumsum(-1)
    return torch.searchsorted(edges, (u.to(edges) * edges[:, -1])[:, None], right=True).squeeze(-1)


def row_uniforms(prompts, steps, seed):
    """One random number in [0, 1) for every row and step, (rows, steps).

    Each row has a generator of its own, seeded by (seed, the prompt, how many equal prompts stand before it). So a
    prompt gets the same numbers in any batch and any order, while several samples of one prompt differ.
    """
    seen, rows = Counter(), torch.empty(len(prompts), steps)
    for row, prompt in zip(rows, prompts):
        key = tuple(prompt)
        digest = blake2b(repr((seed, seen[key], key)).encode(), digest_size=8).digest()
        torch.rand(steps, out=row, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))
        seen[key] += 1
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class _Row:
    """One prompt being answered: its place in the caller's list, its state, what it said, what it must say next."""

    def __init__(self, index, state):
        self.index, self.state, self.ids, self.done = index, state, [], False
        self.forced = state.start() or []

    def push(self, token, eos):
        if self.forced:
            token = self.forced.pop(0)
        self.ids.append(token)
        self.done = token == eos
        if not self.done:
            self.forced += self.state.feed(token) or []
        return token


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompts,
    max_new_tokens=512,
    temperature=0.0,
    top_p=1.0,
    thinking=None,
    thinking_budget=None,
    budget_rule="report",
    seed=0,
    on_token=None,
):
    """Answer a batch of prompts (lists of token ids, of any lengths); returns a `Completion` for each, in order.

    max_new_tokens bounds everything after the prompt, forced tokens included. A row stops at the end of turn, whatever
    the others do. temperature 0 is greedy; otherwise see `sample` and `row_uniforms`: a row says the same in any batch
    (as far as rounding goes: matrix products of another shape may round another way).
    thinking: whether the prompts end inside an open `<think>\\n`: a bool, a list of one a row, or None to look at
    each prompt's end. thinking_budget: None (no limit), a number of tokens, or a list of one a row; budget_rule:
    "report", "client" or "nim", see `ThinkState`. on_token(row, token, state) is called after every token of every row.

    Prompts run in batches of alike lengths. Shorter ones are padded on the left, and the padding is marked as another
    document, which makes it invisible (see `NemotronH`). Rows that are done are dropped from the batch, cache and all,
    when enough of them are.
    Raises ValueError for bad arguments, before any computing.
    """
    budgets, thinkings = _check(
        model, tokenizer, prompts, max_new_tokens, temperature, top_p, thinking, thinking_budget, budget_rule
    )
    if not prompts:
        return []
    rows = [
        _Row(i, ThinkState(tokenizer, budget, budget_rule, on))
        for i, (budget, on) in enumerate(zip(budgets, thinkings))
    ]
    device = model.lm_head.weight.device
    uniforms = row_uniforms(prompts, max_new_tokens, seed).to(device) if temperature > 0 else None
    by_length = sorted(rows, key=lambda row: len(prompts[row.index]))  # prompts of a batch alike: less padding
    at_once = _rows_at_once(model, max(map(len, prompts)) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(rows), at_once):
            batch = by_length[i : i + at_once]
            _run(model, tokenizer, prompts, batch, max_new_tokens, temperature, top_p, uniforms, on_token)
    finally:
        model.train(was_training)
    return [
        Completion(
            tokenizer.decode(prompt), s.thought, s.answer, s.thinking_tokens, s.answer_tokens, s.closed_by, row.ids
        )
        for prompt, row, s in ((prompt, row, row.state) for prompt, row in zip(prompts, rows))
    ]


def _rows_at_once(model, tokens):
    """How many rows of that many tokens to run together: what ROWS says, less if the GPU's memory is short."""
    weight = model.lm_head.weight
    most = ROWS.get(weight.device.type, 64)
    if weight.device.type != "cuda":
        return most
    need = memory_bytes(model.config, tokens, 1, 0, weight.element_size())["total"]
    free, _ = torch.cuda.mem_get_info(weight.device)
    return max(1, min(most, int(free / (2.5 * need))))  # cache, its copy when rows are dropped, activations


def _run(model, tokenizer, prompts, batch, max_new_tokens, temperature, top_p, uniforms, on_token):
    """Fill in the rows of one batch: `batch` is always the rows that are in the cache, in its order."""
    device = model.lm_head.weight.device
    prompts = [prompts[row.index] for row in batch]
    # Prefill. Left padding is document -1, the text document 0.
    longest = max(map(len, prompts))
    pad = tokenizer.pad_id or 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    seq_idx = None
    if min(map(len, prompts)) < longest:
        seq_idx = torch.tensor([[-1] * (longest - len(p)) + [0] * len(p) for p in prompts], device=device)
    cache = model.new_cache(len(prompts), longest + max_new_tokens)
    for s in range(0, longest, PREFILL):
        x = model.features(ids[:, s : s + PREFILL], cache, None if seq_idx is None else seq_idx[:, s : s + PREFILL])
    logits = _head(model, tokenizer, x)
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are not finite numbers: its weights are damaged, or training diverged")

    for step in range(max_new_tokens):
        u = None if uniforms is None else uniforms[[row.index for row in batch], step]
        chosen = sample(logits, temperature, top_p, u).tolist()
        for row, token in zip(batch, chosen):
            if not row.done:
                token = row.push(token, tokenizer.eos_id)
                if on_token is not None:
                    on_token(row.index, token, row.state)
        running = [j for j, row in enumerate(batch) if not row.done]
        if not running or step + 1 == max_new_tokens:
            return
        if len(running) <= SHRINK * len(batch):
            batch = [batch[j] for j in running]
            _keep_rows(cache, torch.tensor(running, device=device))
        # a row that is done but not yet dropped goes on with its end of turn; nobody looks at what comes out
        tokens = torch.tensor([[row.ids[-1]] for row in batch], device=device)
        logits = _head(model, tokenizer, model.features(tokens, cache))


def _head(model, tokenizer, x):
    """Logits (b, vocab) of the last position of x (b, l, d), only of ids that the tokenizer has."""
    return model.lm_head(x[:, -1])[:, : tokenizer.vocab_size].float()


def _keep_rows(cache, rows):
    """Drop all other rows of a batch from its cache; rows is a tensor of row numbers."""
    for layer in cache.layers:
        for name, tensor in vars(layer).items() if layer is not None else ():
            setattr(layer, name, tensor[rows])
    cache.batch_size = len(rows)
    if cache.seq_idx is not None:
        cache.seq_idx = cache.seq_idx[rows]


def _check(model, tokenizer, prompts, max_new_tokens, temperature, top_p, thinking, budget, rule):
    """Every argument of `generate`, or ValueError. Returns the budgets and thinking flags, one a row."""
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {vocab}: they do not belong together"
        )
    if not _whole(max_new_tokens, 1):
        raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r}")
    _check_sampling(temperature, top_p)
    if rule not in GRACE:
        raise ValueError(f"unknown budget_rule {rule!r}; choose one of {', '.join(GRACE)}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            bad = next(t for t in prompt if not 0 <= t < vocab)
            raise ValueError(f"prompt {i} has token id {bad}, outside the model's vocabulary of {vocab}")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {max_new_tokens} more would pass the model's {limit} "
                "positions: shorten the prompt or lower max_new_tokens"
            )
    budgets = list(budget) if isinstance(budget, list | tuple) else [budget] * len(prompts)
    flags = list(thinking) if isinstance(thinking, list | tuple) else [thinking] * len(prompts)
    for name, values in (("thinking_budget", budgets), ("thinking", flags)):
        if len(values) != len(prompts):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(prompts)} prompts: give one a row, or one for all"
            )
    for value in budgets:
        if value is not None and not _whole(value, 0):
            raise ValueError(
                f"thinking_budget must be a whole number of at least 0, or None for no limit; got {value!r}"
            )
    return budgets, [opens_thought(tokenizer, p) if on is None else bool(on) for p, on in zip(prompts, flags)]


def _check_sampling(temperature, top_p):
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0 (0 is greedy); got {temperature!r}")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps every token); got {top_p!r}")


def _whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def chat_prompt(tokenizer, messages, thinking=True):
    """The token ids of a conversation up to the next answer; `thinking=False` adds "/no_think" to the last question.

    The chat template has the last word: "/think" or "/no_think" inside the last question overrides `thinking`.
    """
    user = [m["content"] for m in messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
    if user and not user[-1].replace("/think", "").replace("/no_think", "").strip():
        raise ValueError("the prompt is empty: ask something")
    for m in messages:
        if isinstance(m.get("content"), str) and any(0xD800 <= ord(c) < 0xE000 for c in m["content"]):
            raise ValueError("the prompt is not valid text: it has bytes that are not UTF-8")
    if not thinking and user:
        last = max(i for i, m in enumerate(messages) if m.get("role") == "user")
        changed = messages[last] | {"content": messages[last]["content"] + " /no_think"}
        messages = [*messages[:last], changed, *messages[last + 1 :]]
    return tokenizer.encode_chat(messages, add_generation_prompt=True)


def complete_chat(model, tokenizer, messages, thinking=True, **options):
    """The assistant's next turn of a conversation, as a `Completion`. Options as in `generate`."""
    return generate(model, tokenizer, [chat_prompt(tokenizer, messages, thinking)], **options)[0]


def answer(model, tokenizer, question, system="", thinking=True, **options):
    """One question, one `Completion`, whose `prompt` is the question. Options as in `generate`."""
    completion = complete_chat(model, tokenizer, _messages(question, system), thinking, **options)
    completion.prompt = question
    return completion


def _messages(question, system):
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": question}]


# ----------------------------------------------------------------------------------------------------------------------
# The script


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see --help")


def _parser():
    p = _Parser(prog="generate.py", description="Ask a model, or chat with it.", allow_abbrev=False)
    flag = p.add_argument
    flag("question", nargs="*", help="questions to answer; without any (and without --file) a chat is opened")
    flag("--checkpoint", default="out", metavar="DIR", help="folder of the model and its tokenizer (default: out)")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU if there is one")
    flag(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto: the dtype that the checkpoint was saved in; when memory runs out, bfloat16",
    )  # fmt: skip
    flag(
        "--temperature", type=float, default=0.0,
        help="0, the default, is greedy: small models are best so, and the same question gets the same answer; for the "
        "released models use 0.6 with --top-p 0.95 when they think",
    )  # fmt: skip
    flag("--top-p", type=float, default=1.0, help="draw from the most likely tokens that make up this mass (default 1)")
    flag(
        "--max-new-tokens", type=int,
        help="bound for thought and answer together (default 512, or what the budget needs); lower it when memory "
        "runs out",
    )  # fmt: skip
    flag("--thinking-budget", type=int, metavar="N", help="close the thought after about N tokens (default: no limit)")
    flag(
        "--budget-rule", default="report", choices=list(GRACE),
        help="report: at the next newline after N, at most 500 tokens later; nim: at most N/10 later; client: at N",
    )  # fmt: skip
    flag("--no-think", action="store_true", help="answer without a thought")
    flag("--system", default="", metavar="TEXT", help="system message")
    flag("--seed", type=int, default=0, help="of the draws, when the temperature is above 0")
    flag("--json", action="store_true", help="one JSON object a prompt on stdout")
    flag("--file", metavar="FILE", help="a UTF-8 text file with one question a line; blank lines are skipped")
    return p


def main(argv=None):
    """Run the script; returns the exit code: 0, 2 for bad input (one sentence on stderr), 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        return _script(_parser().parse_args(argv))
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("generate.py: out of memory: lower --max-new-tokens, or use --dtype bfloat16", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 2


def _script(args):
    # Everything that can be wrong is looked at before the model is read, which may take minutes.
    questions = list(args.question)
    if args.file is not None:
        questions += _read_questions(args.file)
    if any(not q.strip() for q in questions):
        raise ValueError("a question is empty: put text between the quotes")
    if args.json and not questions:
        raise ValueError("--json needs questions: give them on the command line or with --file")
    if args.thinking_budget is not None and args.thinking_budget < 0:
        raise ValueError(f"--thinking-budget must be at least 0; got {args.thinking_budget}")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {args.max_new_tokens}")
    _check_sampling(args.temperature, args.top_p)

    model, tokenizer = _load(args)
    options = dict(
        temperature=args.temperature, top_p=args.top_p, budget_rule=args.budget_rule, seed=args.seed,
        thinking_budget=args.thinking_budget, max_new_tokens=_room(args),
    )  # fmt: skip
    if not questions:
        return _chat(model, tokenizer, args, options)
    prompts = [chat_prompt(tokenizer, _messages(q, args.system), not args.no_think) for q in questions]
    began, tokens = time.perf_counter(), 0
    printer = None if args.json or len(questions) > 1 else _Printer()
    at_once = 8 * ROWS["cpu"]  # so that a long file shows its first answers early
    for i in range(0, len(prompts), at_once):
        for j, c in enumerate(generate(model, tokenizer, prompts[i : i + at_once], on_token=printer, **options)):
            c.prompt = questions[i + j]
            tokens += len(c.ids)
            if args.json:
                print(c.to_json(), flush=True)
            elif printer:
                printer.finish(c)
            else:
                print(f"> {c.prompt}")
                _Printer().whole(c)
    seconds = time.perf_counter() - began
    print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def _room(args):
    """--max-new-tokens, or 512, or with a budget enough for the latest forced close and 256 tokens of answer."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    budget = args.thinking_budget
    return 512 if budget is None or args.no_think else max(512, budget + GRACE[args.budget_rule](budget) + 256)


def _read_questions(path):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a text file with one question a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})") from None
    if "\0" in "".join(lines):
        raise ValueError(f"{path} is not text: it has zero bytes")
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{path} is empty: write one question a line")
    return questions


def _load(args):
    """Device, dtype, model and tokenizer, with the reasons on stderr."""
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu")
    device = "cuda" if has_gpu and args.device == "auto" else args.device.replace("auto", "cpu")
    why_device = "as asked" if args.device != "auto" else "a GPU is there" if has_gpu else "no GPU here"
    dtype, why_dtype = getattr(torch, args.dtype, None), "as asked"
    if dtype is None:
        why_dtype = "as the checkpoint was saved"
        if device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            dtype, why_dtype = torch.float32, "this GPU has no bfloat16"
    if not Path(args.checkpoint).exists():
        raise ValueError(
            f"{args.checkpoint} does not exist: train a model with `python train.py`, or give --checkpoint"
        )
    model, tokenizer = load_pretrained(args.checkpoint, device, dtype)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer: copy its tokenizer.json there")
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters())
    how = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    print(
        f"{args.checkpoint}: {parameters:,} parameters, {model.config.hybrid_override_pattern}\n"
        f"device {device} ({why_device}), {dtype} ({why_dtype}), {how}, at most {_room(args)} new tokens",
        file=sys.stderr,
    )
    return model, tokenizer


class _Printer:
    """Shows a response as it comes: the thought dim, the answer plain. Pass it to `generate` as `on_token`.

    Bytes are held back while they may still become a `</think>` or are an unfinished character. No colours when stdout
    is not a terminal or NO_COLOR is set.
    """

    def __init__(self):
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder, self.shown, self.part = codecs.getincrementaldecoder("utf-8")("replace"), 0, None

    def __call__(self, row, token, state):
        if state.thought_end is None:
            self._show("thought", state.data[self.shown : len(state.data) - unfinished_tag(state.data)])
        elif state.thought_end > 0 and self.part != "answer":
            self._show("thought", state.data[self.shown : state.thought_end])
        if not state.open:
            if self.part != "answer":
                self.shown = state.answer_start
                self.decoder.reset()
            self._show("answer", state.data[self.shown :])

    def _show(self, part, new):
        text = self.decoder.decode(bytes(new))
        self.shown += len(new)
        if part != self.part:
            text = text.lstrip()
            if not text:
                return
            self._end()
            self.part = part
            text = ("\033[2m" if self.colour and part == "thought" else "") + f"[{part}]\n" + text
        print(text, end="", flush=True)

    def _end(self):
        if self.part:
            print("\033[0m" if self.colour else "")
        self.part = None

    def whole(self, c):
        """Show a finished Completion at once."""
        for part, text in (("thought", c.thought), ("answer", c.answer)):
            self._show(part, text.encode())
        self.finish(c)

    def finish(self, c):
        """End the response: what is shown is flushed, and a line tells what it took."""
        self._end()
        took = f"{c.answer_tokens} tokens answer"
        if c.thinking_tokens or c.closed_by != "none":
            end = {"model": "closed by the model", "newline": "closed by the budget at a newline"}.get(c.closed_by)
            end = end or ("closed by the budget, forced" if c.closed_by == "forced" else "never closed")
            took = f"{c.thinking_tokens} tokens thought ({end}), {took}"
        print(f"({took})\n", flush=True)


def _chat(model, tokenizer, args, options):
    """The terminal chat. Earlier thoughts stay in `messages`; the chat template leaves them out of the next prompt."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages, thinking = list(system), not args.no_think
    print("/think  /no_think  /budget N (or off)  /new  /quit", file=sys.stderr)
    tokens = seconds = 0
    try:
        while True:
            text = input("> ").strip()
            command, _, value = text.partition(" ")
            if command == "/quit":
                break
            if command in ("/think", "/no_think") and not value:
                thinking = command == "/think"
                print(f"thinking {'on' if thinking else 'off'}", file=sys.stderr)
            elif command == "/budget":
                if value.strip() == "off" or value.strip().isdecimal():
                    args.thinking_budget = None if value.strip() == "off" else int(value)
                    options |= dict(thinking_budget=args.thinking_budget, max_new_tokens=_room(args))
                    print(f"thinking budget {value.strip()}", file=sys.stderr)
                else:
                    print("/budget wants a number of tokens of at least 0, or off", file=sys.stderr)
            elif command == "/new":
                messages = list(system)
                print("a new conversation", file=sys.stderr)
            elif text:
                messages.append({"role": "user", "content": text})
                printer, began = _Printer(), time.perf_counter()
                try:
                    c = complete_chat(model, tokenizer, messages, thinking, on_token=printer, **options)
                except ValueError as error:
                    print(error, file=sys.stderr)
                    messages.pop()
                    continue
                except KeyboardInterrupt:
                    printer._end()
                    raise
                printer.finish(c)
                messages.append({"role": "assistant", "content": f"{c.thought}\n</think>\n{c.answer}"})
                seconds += time.perf_counter() - began
                tokens += len(c.ids)
    except (EOFError, KeyboardInterrupt):
        print()
    if tokens:
        print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
