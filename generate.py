"""From a prompt to an answer: prefill, cached steps, sampling, stop rules, and a terminal chat.

The idea. A prompt is read in one call (prefill), which fills the cache: a fixed-size state for each Mamba layer, keys
and values for each attention layer. Then every step feeds one token a row and reads the logits of the next. A response:

    prompt ... <think>\\n   trace \\n</think>\\n   answer \\n<SPECIAL_12>      thinking on
    prompt ... <think></think>                  answer \\n<SPECIAL_12>      thinking off

What a row says is the model's choice, except where its thinking budget (see budget.py) dictates the next tokens.

Top to bottom: the choice of a token (`sample`), the loop (`generate`), conversations (`chat_prompt`, `answer`), the
script.

    python generate.py "What is 47 + 85?"          one question, or several
    python generate.py                             a chat in the terminal
    python generate.py --json --file questions.txt  one JSON object a line

Why this is written by hand and what the library does better. A serving engine (vLLM, TensorRT-LLM, NIM) pages its
caches, captures the step in a graph and talks to many callers at once; transformers' `generate` has thirty more ways
to choose a token. Here the loop is forty lines that one can step through. This file must not know training.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter, deque
from hashlib import blake2b
from pathlib import Path

from device import choose_device, choose_impl  # isort: skip  (before torch)
import torch

from budget import GRACE, ThinkState, opens_thought
from checkpoint import load_pretrained
from engine import Engine
from model import memory_bytes
from template import check_messages, clean

ROWS = {"cpu": 64, "cuda": 512}  # rows in one batch; on a CPU more are slower, once their states outgrow its caches
JOIN = 0.125  # waiting rows join when at least this share of the slots is empty: short prompts are read together
SHRINK = 0.75  # when nobody waits, empty slots are dropped as soon as at most this share is still running


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

    def __init__(self, index, prompt, state):
        self.index, self.prompt, self.state, self.ids, self.done = index, prompt, state, [], False
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
    model, tokenizer, prompts, max_new_tokens=512, temperature=0.0, top_p=1.0,
    thinking=None, thinking_budget=None, budget_rule="report", seed=0, on_token=None,
):  # fmt: skip
    """Answer a batch of prompts (lists of token ids, of any lengths); returns a `Completion` for each, in order.

    max_new_tokens bounds everything after the prompt, forced tokens included. A row stops at the end of turn, whatever
    the others do. temperature 0 is greedy; otherwise see `sample` and `row_uniforms`: a row says the same in any batch
    (as far as rounding goes: matrix products of another shape may round another way).
    thinking: whether the prompts end inside an open `<think>\\n`: a bool, a list of one a row, or None to look at
    each prompt's end. thinking_budget: None (no limit), a number of tokens, or a list of one a row; budget_rule:
    "report", "client" or "nim", see `ThinkState`. on_token(row, token, state) is called after every token of every row.

    As many rows run together as ROWS says and memory allows; who ends makes room for the next (see engine.py).
    Raises ValueError for bad arguments, before any computing.
    """
    if not isinstance(thinking_budget, list | tuple):
        thinking_budget = [thinking_budget] * len(prompts)
    if not isinstance(thinking, list | tuple):
        thinking = [thinking] * len(prompts)
    _check_options(max_new_tokens, temperature, top_p, thinking_budget, budget_rule)
    _check_rows(model, tokenizer, prompts, max_new_tokens, thinking_budget=thinking_budget, thinking=thinking)
    if not prompts:
        return []
    rows = []
    for i, (prompt, budget, on) in enumerate(zip(prompts, thinking_budget, thinking)):
        on = opens_thought(tokenizer, prompt) if on is None else bool(on)
        rows.append(_Row(i, prompt, ThinkState(tokenizer, budget, budget_rule, on)))
    if temperature > 0:
        uniforms = row_uniforms(prompts, max_new_tokens, seed).to(model.lm_head.weight.device)

    def choose(logits, batch):
        u = uniforms[[row.index for row in batch], [len(row.ids) for row in batch]] if temperature > 0 else None
        return sample(logits, temperature, top_p, u).tolist()

    by_length = sorted(rows, key=lambda row: len(row.prompt))  # prompts of a batch alike: less padding
    at_once = _rows_at_once(model, len(by_length[-1].prompt) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        _run(model, tokenizer, by_length, min(at_once, len(rows)), max_new_tokens, choose, on_token)
    finally:
        model.train(was_training)
    return [row.state.completion(tokenizer.decode(row.prompt), row.ids) for row in rows]


def _rows_at_once(model, tokens):
    """How many rows of that many tokens to run together: what ROWS says, less if the GPU's memory is short."""
    weight = model.lm_head.weight
    most = ROWS.get(weight.device.type, 64)
    if weight.device.type != "cuda":
        return most
    need = memory_bytes(model.config, tokens, 1, 0, weight.element_size())["total"]
    free, _ = torch.cuda.mem_get_info(weight.device)
    return max(1, min(most, int(free / (2.5 * need))))  # cache, its copy when rows are dropped, activations


def _run(model, tokenizer, rows, count, max_new_tokens, choose, on_token):
    """Fill in the rows, `count` of them at a time."""
    engine = Engine(model, count, max(len(row.prompt) for row in rows) + max_new_tokens)
    waiting, slots = deque(rows), [None] * count  # who sits where

    def head(x):
        """Logits (b, vocab) of the stream x (b, d), only of ids that the tokenizer has."""
        return model.lm_head(x)[:, : tokenizer.vocab_size].float()

    def advance(places, logits):
        """Choose the next token of the rows in these places."""
        for place, token in zip(places, choose(logits, [slots[i] for i in places])):
            row = slots[place]
            token = row.push(token, tokenizer.eos_id)
            if on_token is not None:
                on_token(row.index, token, row.state)
            if row.done or len(row.ids) == max_new_tokens:
                slots[place] = None
                engine.stop(place)

    while True:
        empty = [i for i, row in enumerate(slots) if row is None]
        if waiting and len(empty) >= JOIN * len(slots):
            joining = empty[: len(waiting)]
            for place in joining:
                slots[place] = waiting.popleft()
            logits = head(engine.start(joining, [slots[place].prompt for place in joining]))
            if not torch.isfinite(logits).all():
                raise ValueError(
                    "the model's logits are not finite numbers: its weights are damaged, or training diverged"
                )
            advance(joining, logits)
            continue  # some may have ended already
        running = [i for i, row in enumerate(slots) if row is not None]
        if not running:
            return
        if not waiting and len(running) <= SHRINK * len(slots):
            engine.keep(running)
            slots = [slots[i] for i in running]
            running = list(range(len(slots)))
        x = engine.step([0 if row is None else row.ids[-1] for row in slots])
        advance(running, head(x[running]))


def _check_options(max_new_tokens, temperature, top_p, thinking_budget, budget_rule):
    """ValueError if one of these makes no sense, whatever the model. thinking_budget is a list."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r}")
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0 (0 is greedy); got {temperature!r}")
    if not isinstance(top_p, int | float) or not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps every token); got {top_p!r}")
    for n in thinking_budget:
        if n is not None and (type(n) is not int or n < 0):
            raise ValueError(f"thinking_budget must be a whole number of at least 0, or None for no limit; got {n!r}")
    if budget_rule not in GRACE:
        raise ValueError(f"unknown budget_rule {budget_rule!r}; choose one of {', '.join(GRACE)}")


def _check_rows(model, tokenizer, prompts, max_new_tokens, **one_a_row):
    """ValueError if a prompt does not fit the model, or a list has not one entry for each."""
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    if tokenizer.vocab_size > vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {vocab}: they do not belong together"
        )
    for name, values in one_a_row.items():
        if len(values) != len(prompts):
            raise ValueError(f"{name} has {len(values)} entries for {len(prompts)} prompts: give one for each")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: give at least one token")
        bad = next((t for t in (min(prompt), max(prompt)) if not 0 <= t < vocab), None)
        if bad is not None:
            raise ValueError(f"prompt {i} has token id {bad}, outside the model's vocabulary of {vocab}")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, and {max_new_tokens} more would pass the model's {limit} "
                "positions: shorten the prompt or lower max_new_tokens"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def chat_prompt(tokenizer, messages, thinking=True):
    """The token ids of a conversation up to the next answer; `thinking=False` adds "/no_think" to the last question.

    The chat template has the last word: "/think" or "/no_think" inside the last question overrides `thinking`.
    """
    check_messages(messages)
    messages = [dict(message) for message in messages]
    for question in [m for m in messages if m["role"] == "user"][-1:]:
        if not clean(question["content"]):
            raise ValueError("the prompt is empty: ask something")
        question["content"] += "" if thinking else " /no_think"
    if any(0xD800 <= ord(c) < 0xE000 for m in messages for c in m["content"]):
        raise ValueError("the prompt is not valid text: it has bytes that are not UTF-8")
    return tokenizer.encode_chat(messages)


def complete_chat(model, tokenizer, messages, thinking=True, **options):
    """The assistant's next turn of a conversation, as a `Completion`. Options as in `generate`."""
    return generate(model, tokenizer, [chat_prompt(tokenizer, messages, thinking)], **options)[0]


def answer(model, tokenizer, question, system="", thinking=True, **options):
    """One question, one `Completion`, whose `prompt` is the question. Options as in `generate`."""
    completion = complete_chat(model, tokenizer, _asked(question, _system(system)), thinking, **options)
    completion.prompt = question
    return completion


def _system(text):
    return [{"role": "system", "content": text}] if text else []


def _asked(question, before):
    return [*before, {"role": "user", "content": question}]


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
        "--impl", default="auto", choices=["auto", "torch", "triton"],
        help="who computes the Mamba-2 layers: PyTorch, or the Triton kernels (a GPU); auto chooses and says why",
    )  # fmt: skip
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
    questions = args.question + ([] if args.file is None else _read_questions(args.file))
    if any(not q.strip() for q in questions):
        raise ValueError("a question is empty: put text between the quotes")
    if args.json and not questions:
        raise ValueError("--json needs questions: give them on the command line or with --file")
    _check_options(_room(args), args.temperature, args.top_p, [args.thinking_budget], args.budget_rule)

    model, tokenizer = _load(args)
    options = {k: getattr(args, k) for k in ("temperature", "top_p", "seed", "thinking_budget", "budget_rule")}
    options["max_new_tokens"] = _room(args)
    began = time.perf_counter()
    if questions:
        tokens, seconds = _answer_all(model, tokenizer, args, questions, options), time.perf_counter() - began
    else:
        tokens, seconds = _chat(model, tokenizer, args, options)
    if tokens:
        print(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def _answer_all(model, tokenizer, args, questions, options):
    """Answer and print; returns the number of tokens said."""
    prompts = [chat_prompt(tokenizer, _asked(q, _system(args.system)), not args.no_think) for q in questions]
    only = _Printer() if len(questions) == 1 and not args.json else None  # shown as it comes
    tokens, at_once = 0, 8 * ROWS["cpu"]  # so that a long file shows its first answers early
    for i in range(0, len(prompts), at_once):
        for j, c in enumerate(generate(model, tokenizer, prompts[i : i + at_once], on_token=only, **options)):
            c.prompt = questions[i + j]
            tokens += len(c.ids)
            if args.json:
                print(c.to_json(), flush=True)
            elif only:
                only.finish(c)
            else:
                print(f"> {c.prompt}")
                _Printer().finish(c)
    return tokens


def _room(args):
    """--max-new-tokens, or 512, or with a budget enough for the latest forced close and 256 tokens of answer."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    budget = args.thinking_budget
    return 512 if budget is None or args.no_think else max(512, budget + GRACE[args.budget_rule](budget) + 256)


def _read_questions(path):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a text file with one question a line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#x})") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it has zero bytes")
    questions = [line.strip() for line in text.splitlines() if line.strip()]
    if not questions:
        raise ValueError(f"{path} is empty: write one question a line")
    return questions


def _load(args):
    """Device, dtype, model and tokenizer, with the reasons on stderr."""
    device, why_device = choose_device(args.device)
    choose_impl(args.impl, device)  # a wish that cannot be met is said before anything is loaded
    dtype, why_dtype = getattr(torch, args.dtype, None), "as asked" if args.dtype != "auto" else "as saved"
    if dtype is None and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        dtype, why_dtype = torch.float32, "this GPU has no bfloat16"
    if not Path(args.checkpoint).exists():
        raise ValueError(f"{args.checkpoint} does not exist: train one with `python train.py`, or give --checkpoint")
    model, tokenizer = load_pretrained(args.checkpoint, device, dtype)
    impl, why_impl = choose_impl(args.impl, device, model.config)
    model.use(impl)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer: copy its tokenizer.json there")
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    parameters = sum(p.numel() for p in model.parameters())
    how = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    print(
        f"{args.checkpoint}: {parameters:,} parameters, {model.config.hybrid_override_pattern}\n"
        f"device {device} ({why_device}), {dtype} ({why_dtype}), impl {impl} ({why_impl}), "
        f"{how}, at most {_room(args)} new tokens",
        file=sys.stderr,
    )
    return model, tokenizer


class _Printer:
    """Shows a response as it comes: the thought dim, the answer plain. Pass it to `generate` as `on_token`.

    No colours when stdout is not a terminal or NO_COLOR is set.
    """

    def __init__(self):
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.shown = {}  # part -> its text so far

    def __call__(self, row, token, state):
        self.show(*state.so_far())

    def show(self, thought, answer):
        """Print what is new in either part."""
        for part, text in (("thought", thought), ("answer", answer)):
            new = text[len(self.shown.get(part, "")) :]
            if not new:
                continue
            if part not in self.shown:
                new = f"[{part}]\n{new}"
                print("\n" if self.shown else "", end="")
            self.shown[part] = text
            print(f"\033[2m{new}\033[0m" if self.colour and part == "thought" else new, end="", flush=True)

    def finish(self, c):
        """End the response of a Completion: show what is left of it, and a line that tells what it took."""
        self.show(c.thought, c.answer)
        print("\n" if self.shown else "", end="")
        took = f"{c.answer_tokens} tokens answer"
        if c.thinking_tokens or c.closed_by != "none":
            end = {"model": "closed by the model", "newline": "closed by the budget at a newline"}
            end |= {"forced": "closed by the budget, forced", "none": "never closed"}
            took = f"{c.thinking_tokens} tokens thought ({end[c.closed_by]}), {took}"
        print(f"({took})\n", flush=True)


def _chat(model, tokenizer, args, options):
    """The terminal chat; returns tokens said and seconds taken.

    Earlier thoughts stay in `messages`; the chat template leaves them out of the next prompt.
    """
    messages, thinking, tokens, seconds = _system(args.system), not args.no_think, 0, 0.0
    tell = lambda text: print(text, file=sys.stderr)
    tell("/think  /no_think  /budget N (or off)  /new  /quit")
    try:
        while True:
            text = input("> ").strip()
            command, _, value = text.partition(" ")
            if command == "/quit":
                break
            if text in ("/think", "/no_think"):
                thinking = text == "/think"
                tell(f"thinking {'on' if thinking else 'off'}")
            elif command == "/budget" and (value.strip() == "off" or value.strip().isdecimal()):
                args.thinking_budget = None if value.strip() == "off" else int(value)
                options |= dict(thinking_budget=args.thinking_budget, max_new_tokens=_room(args))
                tell(f"thinking budget {value.strip()}")
            elif command == "/budget":
                tell("/budget wants a number of tokens of at least 0, or off")
            elif command == "/new":
                messages = _system(args.system)
                tell("a new conversation")
            elif text:
                asked, began, printer = _asked(text, messages), time.perf_counter(), _Printer()
                try:
                    c = complete_chat(model, tokenizer, asked, thinking, on_token=printer, **options)
                except ValueError as error:
                    tell(error)
                    continue
                printer.finish(c)
                messages = [*asked, {"role": "assistant", "content": f"{c.thought}\n</think>\n{c.answer}"}]
                seconds += time.perf_counter() - began
                tokens += len(c.ids)
    except (EOFError, KeyboardInterrupt):
        print()
    return tokens, seconds


if __name__ == "__main__":
    sys.exit(main())
