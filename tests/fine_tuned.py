"""What the tests of fine-tuning share: a vocabulary made of its conversations, a tiny base model, and a script that
speaks in a model's place."""

from functools import cache
from random import Random

from reference import ours

import conversations
from budget import ThinkState
from tokenizer import train_bpe


@cache
def vocabulary():
    rng, mix = Random("vocabulary"), conversations.MIX[3] | {"retrieval": 0.2}
    drawn = [conversations.draw(rng, mix, 0.0) for _ in range(300)]
    texts = [f"{m['role']}\n{m['content']}\n" for e in drawn for m in e.messages]
    return train_bpe(texts + [f"{e.trace}\n{e.answer}\n" for e in drawn], 600)


@cache
def base_model():
    tokenizer = vocabulary()
    return ours(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48)


def spoken(tokenizer, text):
    """Ids of what a model says, `</think>` being one of them, and the end of the turn."""
    ids = []
    for i, part in enumerate(text.split("</think>")):
        ids += ([tokenizer.end_think_id] if i else []) + tokenizer.encode(part)
    return [*ids, tokenizer.eos_id]


def speaker(reply, stubborn=False):
    """A stand-in for `generate`: reply(prompt text, thinking) is what is said. When the budget closes the thought, it
    goes on with its answer, or, `stubborn`, with its thought."""

    def generate(model, tokenizer, prompts, max_new_tokens=512, temperature=0.0, thinking=True, thinking_budget=None):
        done = []
        for prompt in prompts:
            text = reply(tokenizer.decode(prompt), thinking)
            wish, said = spoken(tokenizer, text), []
            after = spoken(tokenizer, text.partition("</think>")[2].lstrip("\n"))
            state = ThinkState(tokenizer, thinking_budget, "report", thinking)
            forced = state.start() or []
            closed = not thinking
            while (forced or wish) and len(said) < max_new_tokens:
                said.append(forced.pop(0) if forced else wish.pop(0))
                if said[-1] == tokenizer.eos_id:
                    break
                forced += state.feed(said[-1]) or []
                if not state.open and not closed:
                    closed = True
                    if state.closed_by != "model" and not stubborn:
                        wish = after
            done.append(state.completion(tokenizer.decode(prompt), said))
        return done

    return generate
