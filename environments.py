"""What reinforcement learning tries: prompts without an answer, and who judges the answers.

The idea. A reward is a number for an answer, and it need not know how the answer came about. Here are three judges: a
program (instructions.py), a model of somebody's taste (judge.py), and the scorers of a public package, which nobody
here wrote. Each environment has the same face:

    draw(rng)               (messages, thinking, item): a conversation up to the answer, whether to think, and what the
                            judge must know
    score(items, answers)   a number for each answer
    measure(model, ...)     {name: number} on held-out prompts, greedily: what this environment alone can say
    room                    tokens that an answer may have, its thought included

    Instructions   one to five conditions, where tuning showed one to three; 1 if all are met, else half their share
    Preferences    the reward model's score; half of the prompts with "/no_think"
    Gym            questions of reasoning-gym (optional: pip install reasoning-gym), scored by it. The model was never
                   shown a thought about them: whether it learns to think about them by itself is the question

`answer_of` takes a rollout apart: the answer, and whether it is well formed. This file must not know losses.
"""

import importlib.util
from random import Random

import instructions
import preferences
import skills
from device import choose_impl
from generate import chat_prompt, generate
from judge import load_reward, score_answers
from template import END_THINK, THINK

GYM = {  # options of reasoning-gym's families that keep them within what models of this size write
    "chain_sum": dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2),
    "spell_backward": dict(min_word_len=3, max_word_len=5),
    "letter_counting": dict(min_words=2, max_words=4),
    "number_sorting": dict(min_numbers=3, max_numbers=4),
}


def is_share(name):
    """True if what has that name, among skills and what is measured here, is a share: no score and no length."""
    return name not in ("judged", "ruled") and not name.endswith(" thought")


def user(text):
    return [{"role": "user", "content": text}]


def answer_of(tokenizer, sample, thinking):
    """(answer, well formed) of a rollout: well formed is exactly one `</think>` where there is a thought and none where
    not, an answer behind it, and the end of the turn."""
    said = tokenizer.decode(sample.said[:-1] if sample.ended else sample.said)
    _, tag, answer = said.partition(END_THINK) if thinking else ("", END_THINK, said)
    answer = answer.strip() if tag else ""
    once = END_THINK not in answer and THINK not in said.replace(END_THINK, "")
    return answer, bool(sample.ended and answer and once)


def _greedy(model, tokenizer, texts, room, thinking=True):
    prompts = [chat_prompt(tokenizer, user(text), thinking) for text in texts]
    return generate(model, tokenizer, prompts, room, thinking=thinking)


class Instructions:
    """Conditions that a program verifies. Tuning showed prompts of one to three; here up to five."""

    room, most = 128, 5

    def draw(self, rng):
        prompt, _, _ = instructions.sample(rng, rng.randint(1, self.most), "train")
        return user(prompt.text), True, prompt

    def score(self, items, answers):
        return [self._one(prompt, answer) for prompt, answer in zip(items, answers)]

    @staticmethod
    def _one(prompt, answer):
        """1 if all conditions are met by words of the kind asked for; else half the share of them, or 0 off topic."""
        if not instructions.on_topic(prompt, answer):
            return 0.0
        met = instructions.follows(prompt, answer)
        return 1.0 if all(met) else 0.5 * sum(met) / len(met)

    def measure(self, model, tokenizer, count, seed=0):
        """{"hard": prompts of four and five conditions, more than tuning showed, with all of them met}."""
        asked = [instructions.sample(Random(f"hard {seed} {i}"), 4 + i % 2, "test")[0] for i in range(count)]
        done = _greedy(model, tokenizer, [p.text for p in asked], self.room)
        return {"hard": skills.share(instructions.check(p, c.answer) for p, c in zip(asked, done))}


class Preferences:
    """What the reward model in a folder likes, in its units: 0 is an answer like any, 1 a standard deviation better.

    ValueError if its tokenizer is not the policy's."""

    room = 128

    def __init__(self, folder, tokenizer, device, dtype=None, impl="auto"):
        self.judge, theirs = load_reward(folder, device, dtype)
        self.judge.backbone.use(choose_impl(impl, device, self.judge.config)[0])
        if (theirs.ranks, theirs.specials) != (tokenizer.ranks, tokenizer.specials):
            raise ValueError(
                f"{folder} has another tokenizer than the policy: judge with one trained on its checkpoint"
            )
        self.tokenizer = tokenizer

    def draw(self, rng):
        prompt = preferences.draw_prompt(rng, "train")
        return user(prompt.text), rng.random() < 0.5, prompt

    def score(self, items, answers):
        return score_answers(self.judge, self.tokenizer, items, answers)

    def measure(self, model, tokenizer, count, seed=0):
        """{"judged": the reward model's mean score, "ruled": the hidden rule's}."""
        asked = [preferences.draw_prompt(Random(f"judged {seed} {i}"), "test") for i in range(count)]
        answers = [c.answer for c in _greedy(model, tokenizer, [p.text for p in asked], self.room)]
        ruled = sum(preferences.score(p, a) for p, a in zip(asked, answers)) / count
        return {"judged": sum(self.score(asked, answers)) / count, "ruled": ruled}


class Gym:
    """Questions of some families of reasoning-gym, as many of each, and its own scorers.

    families: names with commas between. ValueError if the package is not installed or has no such family."""

    room, size = 160, 2000

    def __init__(self, families, seed=0):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("--reward gym needs the package reasoning-gym: pip install reasoning-gym")
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        self.names = [name.strip() for name in families.split(",") if name.strip()]
        unknown = [name for name in self.names if name not in DATASETS]
        if unknown or not self.names:
            raise ValueError(f"--families {families!r}: {unknown or 'nothing'} is not a family of reasoning-gym")
        make = lambda name, s: reasoning_gym.create_dataset(name, size=self.size, seed=s, **GYM.get(name, {}))
        self.sets = {name: make(name, seed) for name in self.names}
        seen = {entry["question"] for of in self.sets.values() for entry in of}
        fresh = {name: make(name, seed + 10_000_019) for name in self.names}
        self.held_out = {name: [e for e in of if e["question"] not in seen] for name, of in fresh.items()}
        if small := [name for name, of in self.held_out.items() if not of]:
            raise ValueError(f"--families: {', '.join(small)} has no question left that training does not ask: drop it")

    def draw(self, rng):
        name = rng.choice(self.names)
        entry = self.sets[name][rng.randrange(self.size)]
        return user(entry["question"]), True, (name, entry)

    def score(self, items, answers):
        return [float(self.sets[name].score_answer(a, entry=entry)) for (name, entry), a in zip(items, answers)]

    def measure(self, model, tokenizer, count, seed=0):
        """{family: share of held-out questions answered right, "family off": without a thought, "family thought": the
        mean tokens of a thought}. No question of the training set is among them."""
        found = {}
        for name, of in self.held_out.items():
            of = of[:count]
            for thinking in (True, False):
                done = _greedy(model, tokenizer, [e["question"] for e in of], self.room, thinking)
                right = (self.sets[name].score_answer(c.answer, entry=e) >= 1 for c, e in zip(done, of))
                found[name if thinking else f"{name} off"] = skills.share(right)
                if thinking:
                    found[f"{name} thought"] = sum(c.thinking_tokens for c in done) / len(done)
        return found
