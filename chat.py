"""The terminal: the flags of `generate.py`, a response shown as it comes, and a conversation.

The idea. A model speaks in tokens, a reader reads text, and a token may end in the middle of a character or of a
`</think>`. So what is shown after a token is not that token but what has grown in the text so far, which holds back
whatever may still turn out to be something else (`ThinkState.so_far`):

    tokens     4   €(1/3)  €(2/3)  €(3/3)   \\n   </   think   >\\n   4    6
    shown      4                   €                                4    6
               [thought]                                            [answer]

Top to bottom: the flags (`parse`, `most_tokens`, `read_questions`), what is shown (`Printer`), what is typed
(`converse`). Whoever answers is a function given by the caller: this file must not know models or prompts.
"""

import argparse
import os
import sys
from pathlib import Path

from budget import GRACE

# ----------------------------------------------------------------------------------------------------------------------
# Flags and files


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse(argv=None):
    """The flags of generate.py as a namespace, `question` with those of --file; ValueError for what makes no sense."""
    p = _Parser(prog="generate.py", description="Ask a model, or chat with it.", allow_abbrev=False)
    flag = p.add_argument
    flag("question", nargs="*", help="questions to answer; without any (and without --file) a chat is opened")
    flag("--checkpoint", default="out", metavar="DIR", help="folder of the model and its tokenizer (default: out)")
    flag("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU if there is one")
    flag(
        "--impl", default="auto", choices=["auto", "torch", "triton"],
        help="who computes layers and steps: PyTorch, or the Triton kernels (a GPU); auto chooses and says why",
    )  # fmt: skip
    flag(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="auto: the dtype that the checkpoint was saved in; when memory runs out, bfloat16",
    )  # fmt: skip
    flag("--int8", action="store_true", help="round the large matrices to eight bits: little more than half the memory")
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
    args = p.parse_args(argv)
    args.question += [] if args.file is None else read_questions(args.file)
    if any(not q.strip() for q in args.question):
        raise ValueError("a question is empty: put text between the quotes")
    if args.json and not args.question:
        raise ValueError("--json needs questions: give them on the command line or with --file")
    return args


def most_tokens(args, budget, thinking=True):
    """--max-new-tokens, or 512, or with a budget enough for the latest forced close and 256 tokens of answer."""
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    return max(512, budget + GRACE[args.budget_rule](budget) + 256) if thinking and budget is not None else 512


def read_questions(path):
    """The lines of a UTF-8 text file, stripped, without the blank ones; ValueError if it cannot be read or has none."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Shown


class Printer:
    """Shows one response on stdout as it comes: the thought dim, the answer plain.

        printer = Printer()
        completion, = generate(..., on_token=printer)
        printer.finish(completion)

    No colours when stdout is not a terminal or NO_COLOR is set.
    """

    def __init__(self):
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.shown = {}  # part -> its text so far

    def __call__(self, row, token, state):
        """To be called after every token, with the row's ThinkState."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Typed


def converse(complete, system="", thinking=True, budget=None):
    """A chat in the terminal, until /quit, Ctrl-D or Ctrl-C.

    complete(messages, thinking, budget, on_token) gives the assistant's next turn as a Completion, or raises ValueError
    with a sentence for the user. Earlier thoughts stay in the messages; the chat template leaves them out of the next
    prompt.
    """
    start = [{"role": "system", "content": system}]
    messages = start
    tell = lambda text: print(text, file=sys.stderr)
    tell("/think  /no_think  /budget N (or off)  /new  /quit")
    try:
        while True:
            text = input("> ").strip()
            command, _, value = text.partition(" ")
            value = value.strip()
            if command == "/quit":
                break
            if text in ("/think", "/no_think"):
                thinking = text == "/think"
                tell(f"thinking {'on' if thinking else 'off'}")
            elif command == "/budget" and (value == "off" or value.isdecimal()):
                budget = None if value == "off" else int(value)
                tell(f"thinking budget {value}")
            elif command == "/budget":
                tell("/budget wants a number of tokens of at least 0, or off")
            elif command == "/new":
                messages = start
                tell("a new conversation")
            elif text:
                asked, printer = [*messages, {"role": "user", "content": text}], Printer()
                try:
                    c = complete(asked, thinking, budget, printer)
                except ValueError as error:
                    tell(error)
                    continue
                printer.finish(c)
                messages = [*asked, {"role": "assistant", "content": f"{c.thought}\n</think>\n{c.answer}"}]
    except (EOFError, KeyboardInterrupt):
        print()
