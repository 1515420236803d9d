"""From a prompt to an answer: prefill, cached steps, sampling, stop rules, and a terminal chat.

The idea. A prompt is read in one call (prefill), which fills the cache: a fixed-size state for each Mamba layer, keys
and values for each attention layer. Then every step feeds one token a row and reads the logits of the next. A response:

    prompt ... <think>\\n   trace \\n</think>\\n   answer \\n<SPECIAL_12>      thinking on
    prompt ... <think></think>                  answer \\n<SPECIAL_12>      thinking off

What a row says is the model's choice, except where its thinking budget (see budget.py) dictates the next tokens.

Top to bottom: the choice of a token (`sample`), the loop (`generate`) and what it took (`Speed`), conversations
(`chat_prompt`, `answer`), the script, whose flags and screen are in chat.py.

    python generate.py "What is 47 + 85?"          one question, or several
    python generate.py                             a chat in the terminal
    python generate.py --json --file questions.txt  one JSON object a line

Why this is written by hand and what the library does better. A serving engine (vLLM, TensorRT-LLM, NIM) pages its
caches, shares them between prompts that begin alike, and talks to many callers at once; transformers' `generate` has
thirty more ways to choose a token. Here the loop is forty lines that one can step through. This file must not know
training.
"""

import math
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from device import choose_device, choose_impl, free_bytes  # isort: skip  (before torch)
import torch

from budget import GRACE, ThinkState, opens_thought
from chat import Printer, converse, most_tokens, parse
from checkpoint import check_room, load_pretrained
from engine import PREFILL, Engine
from sizes import count_parameters, largest_batch, step_bytes, weights_bytes, work_bytes
from template import check_messages, clean

ROWS = {"cpu": 64, "cuda": 512}  # rows in one batch; on a CPU more are slower, once their states outgrow its caches
SAMPLING = (
    60  # bytes a row and token of the vocabulary while one is chosen: logits, their copy, probabilities in float64
)
AT_ONCE = 512  # questions answered before the first are shown
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


@dataclass
class Speed:
    """What calls of `generate` took: give each the same one, and print it.

    A prefill reads a prompt and chooses the row's first token, a step chooses the next token of all rows at once. The
    seconds are the host's, for the whole turn of the loop: choosing waits for the device. moved: the bytes that these
    steps could not avoid moving (`step_bytes`); over their seconds it is the memory bandwidth achieved.
    """

    rows: int = 0
    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0  # said, those of the prefills too
    steps: int = 0
    step_seconds: float = 0.0
    moved: int = 0

    def __str__(self):
        first, then = self.prefill_seconds, self.step_seconds
        line = f"{self.tokens:,} tokens in {first + then:.1f} s: prefill {self.prompt_tokens:,} tokens {first:.2f} s"
        if self.steps:
            line += f"; {self.steps:,} steps of {1000 * then / self.steps:.1f} ms, "
            line += f"{(self.tokens - self.rows) / then:,.0f} tokens/s, {self.moved / then / 1e9:.2f} GB/s moved"
        return line


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
    thinking=None, thinking_budget=None, budget_rule="report", seed=0, on_token=None, speed=None,
):  # fmt: skip
    """Answer a batch of prompts (lists of token ids, of any lengths); returns a `Completion` for each, in order.

    max_new_tokens bounds everything after the prompt, forced tokens included. A row stops at the end of turn, whatever
    the others do. temperature 0 is greedy; otherwise see `sample` and `row_uniforms`: a row says the same in any batch
    (as far as rounding goes: matrix products of another shape may round another way).
    thinking: whether the prompts end inside an open `<think>\\n`: a bool, a list of one a row, or None to look at
    each prompt's end. thinking_budget: None (no limit), a number of tokens, or a list of one a row; budget_rule:
    "report", "client" or "nim", see `ThinkState`. on_token(row, token, state) is called after every token of every row;
    speed, a `Speed`, is told how long it all took.

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
    at_once, piece = _rows_at_once(model, len(by_length[-1].prompt) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        engine = Engine(model, min(at_once, len(rows)), len(by_length[-1].prompt) + max_new_tokens, piece)
        _run(engine, tokenizer, by_length, max_new_tokens, choose, on_token, speed or Speed())
    finally:
        model.train(was_training)
    return [row.state.completion(tokenizer.decode(row.prompt), row.ids) for row in rows]


def _rows_at_once(model, tokens):
    """(rows, piece): how many rows of that many tokens to run together, what ROWS says or what there is memory for, and
    in pieces of how many tokens to read prompts. ValueError, in one sentence, if not one row fits."""
    weight, config, int8 = model.lm_head.weight, model.config, _is_int8(model)
    device, size = weight.device, weight.element_size()
    most, usual = ROWS.get(device.type, ROWS["cpu"]), PREFILL.get(device.type, PREFILL["cpu"])
    held = weights_bytes(config, size, int8) if device.type == "cuda" else 0  # of what is free, they are gone already
    for piece in (usual, usual // 16):
        # twice: prompts that are read together have a cache of their own, as large as the rest of the work at most
        work = 2 * work_bytes(config, piece, weight_bytes=size) * (1 if model.impl == "triton" else 3)
        rows = largest_batch(
            config, free_bytes(device) + held, tokens, int8, work, size, row_work=SAMPLING * config.vocab_size
        )
        if rows:
            return min(rows, most), piece
    check_room(config, device, tokens, 1, int8, size, work, held)
    return 1, piece


def _is_int8(model):
    return any(buffer.dtype == torch.int8 for buffer in model.buffers())


def _run(engine, tokenizer, rows, max_new_tokens, choose, on_token, speed):
    """Fill in the rows, as many at a time as the engine has slots; add to speed what it took."""
    model, waiting, slots = engine.model, deque(rows), [None] * len(engine.lengths)  # who sits where
    size, int8 = model.lm_head.weight.element_size(), _is_int8(model)

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
        speed.tokens += len(places)

    while True:
        began = time.perf_counter()
        empty = [i for i, row in enumerate(slots) if row is None]
        if waiting and len(empty) >= JOIN * len(slots):
            joining = empty[: len(waiting)]
            for place in joining:
                slots[place] = waiting.popleft()
            logits = engine.start(joining, [slots[place].prompt for place in joining])[:, : tokenizer.vocab_size]
            if not torch.isfinite(logits).all():
                raise ValueError("logits are not finite numbers: the model's weights are damaged, or training diverged")
            speed.rows += len(joining)
            speed.prompt_tokens += sum(len(slots[place].prompt) for place in joining)
            advance(joining, logits)
            speed.prefill_seconds += time.perf_counter() - began
            continue  # some may have ended already
        running = [i for i, row in enumerate(slots) if row is not None]
        if not running:
            return
        if not waiting and len(running) <= SHRINK * len(slots):
            engine.keep(running)
            slots = [slots[i] for i in running]
            running = list(range(len(slots)))
        speed.moved += step_bytes(model.config, [n for n in engine.lengths if n], size, size, int8=int8)
        logits = engine.step([0 if row is None else row.ids[-1] for row in slots])
        advance(running, logits[running, : tokenizer.vocab_size])
        speed.steps += 1
        speed.step_seconds += time.perf_counter() - began


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
    completion = complete_chat(model, tokenizer, _asked(question, system), thinking, **options)
    completion.prompt = question
    return completion


def _asked(question, system):
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


# ----------------------------------------------------------------------------------------------------------------------
# The script


def main(argv=None):
    """Run the script; returns the exit code: 0, 2 for bad input (one sentence on stderr), 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    try:
        return _script(parse(argv))
    except ValueError as error:
        print(f"generate.py: {error}", file=sys.stderr)
    except RuntimeError as error:  # a CPU's allocator has no error of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print("generate.py: out of memory: lower --max-new-tokens, or use --dtype bfloat16 or --int8", file=sys.stderr)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 2


def _script(args):
    thinking, budget, speed = not args.no_think, args.thinking_budget, Speed()
    room = most_tokens(args, budget, thinking)
    _check_options(room, args.temperature, args.top_p, [budget], args.budget_rule)  # before the model is read
    model, tokenizer = _load(args, room)
    options = {k: getattr(args, k) for k in ("temperature", "top_p", "seed", "budget_rule")} | {"speed": speed}

    def complete(messages, thinking, budget, on_token):
        limits = dict(max_new_tokens=most_tokens(args, budget), thinking_budget=budget)
        return complete_chat(model, tokenizer, messages, thinking, on_token=on_token, **limits, **options)

    if args.question:
        options |= dict(max_new_tokens=room, thinking_budget=budget)
        _answer_all(model, tokenizer, args, options)
    else:
        converse(complete, args.system, thinking, budget)
    if speed.tokens:
        print(speed, file=sys.stderr)
    return 0


def _answer_all(model, tokenizer, args, options):
    """Answer the questions and print."""
    questions = args.question
    prompts = [chat_prompt(tokenizer, _asked(q, args.system), not args.no_think) for q in questions]
    only = Printer() if len(questions) == 1 and not args.json else None  # shown as it comes
    for i in range(0, len(prompts), AT_ONCE):  # so that a long file shows its first answers early
        for j, c in enumerate(generate(model, tokenizer, prompts[i : i + AT_ONCE], on_token=only, **options)):
            c.prompt = questions[i + j]
            if args.json:
                print(c.to_json(), flush=True)
            elif only:
                only.finish(c)
            else:
                print(f"> {c.prompt}")
                Printer().finish(c)


def _load(args, room):
    """Device, dtype, model and tokenizer, with the reasons on stderr."""
    device, why_device = choose_device(args.device)
    choose_impl(args.impl, device)  # a wish that cannot be met is said before anything is loaded
    dtype, why_dtype = getattr(torch, args.dtype, None), "as asked" if args.dtype != "auto" else "as saved"
    if dtype is None and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        dtype, why_dtype = torch.float32, "this GPU has no bfloat16"
    if not Path(args.checkpoint).exists():
        raise ValueError(f"{args.checkpoint} does not exist: train one with `python train.py`, or give --checkpoint")
    model, tokenizer = load_pretrained(args.checkpoint, device, dtype, int8=args.int8)
    impl, why_impl = choose_impl(args.impl, device, model.config)
    model.use(impl)
    if tokenizer is None:
        raise ValueError(f"{args.checkpoint} has no tokenizer: copy its tokenizer.json there")
    dtype, parameters = str(model.lm_head.weight.dtype).removeprefix("torch."), count_parameters(model.config)["total"]
    how = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, top-p {args.top_p:g}"
    int8 = ", large matrices int8 (as asked)" * args.int8
    print(
        f"{args.checkpoint}: {parameters:,} parameters, {model.config.hybrid_override_pattern}\n"
        f"device {device} ({why_device}), {dtype} ({why_dtype}){int8}, impl {impl} ({why_impl}), "
        f"{how}, at most {room} new tokens",
        file=sys.stderr,
    )
    return model, tokenizer


if __name__ == "__main__":
    sys.exit(main())
