"""engine.py: a row in a slot is the row alone, whoever sits beside it, came before it, or leaves."""

import random

import pytest
import torch
from reference import ours

from engine import Engine

PROMPTS = [[3, 40, 60], list(range(5, 45)), [9], [7, 8] * 9, [61, 2, 33, 4, 5]]


@pytest.fixture(scope="module")
def model():
    return ours(vocab_size=64, seed=3).eval()


def full_logits(model, ids):
    """The logits at every position of a row, from one full forward."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def walk(model, machine, rows, steps):
    """Feed each slot's row its own next tokens; {slot: list of logits}."""
    found = {slot: [] for slot in rows}
    for i in range(steps):
        x = machine.step([rows[slot][i] if slot in rows else 0 for slot in range(len(machine.lengths))])
        for slot in rows:
            found[slot].append(x[slot].clone())
    return found


NEXT = [[11, 12, 13, 14], [1, 2, 3, 4], [50, 40, 30, 20], [6, 6, 6, 6], [63, 0, 63, 0]]


@torch.inference_mode()
@pytest.mark.parametrize("piece", [1, 7, 1024])  # prompts longer than a piece are read alone, in their slot
def test_rows_of_different_lengths_equal_the_full_forward(model, piece):
    machine = Engine(model, 5, 50, piece)
    first = machine.start(range(5), PROMPTS)
    then = walk(model, machine, dict(enumerate(NEXT)), 4)
    for slot, (prompt, more) in enumerate(zip(PROMPTS, NEXT)):
        full = full_logits(model, prompt + more)
        assert torch.allclose(first[slot], full[len(prompt) - 1], atol=2e-5)
        for i, x in enumerate(then[slot]):
            assert torch.allclose(x, full[len(prompt) + i], atol=2e-5), (slot, i)


@torch.inference_mode()
def test_neighbours_change_nothing(model):
    """Alone, beside short rows, beside long ones; these lengthen attention's sums by zeros, so rounding may differ."""
    found = []
    for others in ([], [0, 1], [3, 4]):
        machine = Engine(model, 3, 50)
        machine.start([1], [PROMPTS[2]])
        for slot, i in zip((0, 2), others):
            machine.start([slot], [PROMPTS[i]])
        found.append(torch.stack(walk(model, machine, {1: NEXT[2]}, 4)[1]))
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[0], found[2], atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("together", [False, True])
def test_nothing_is_left_of_the_row_before(model, together):
    """A slot that was full of large numbers says the same as a fresh one."""
    machine = Engine(model, 3, 60)
    machine.start([0, 1, 2], PROMPTS[:3])
    for layer in filter(None, machine.cache.layers):
        for tensor in vars(layer).values():
            tensor[1:] = 1e4
    machine.stop(1)
    machine.stop(2)
    if together:
        machine.start([1, 2], [PROMPTS[3], PROMPTS[4]])
    else:
        machine.start([1], [PROMPTS[3]])
        machine.start([2], [PROMPTS[4]])
    then = walk(model, machine, {1: NEXT[3], 2: NEXT[4]}, 3)
    for slot, i in ((1, 3), (2, 4)):
        full = full_logits(model, PROMPTS[i] + NEXT[i])
        for j, x in enumerate(then[slot]):
            assert torch.allclose(x, full[len(PROMPTS[i]) + j], atol=2e-5)


@torch.inference_mode()
def test_rows_come_and_go_at_random(model):
    """Forty rows through four slots, in random order, some slots dropped at the end."""
    r = random.Random(5)
    rows = [[r.randrange(64) for _ in range(r.randint(2, 30))] for _ in range(40)]
    prompt = [r.randint(1, len(row) - 1) for row in rows]
    waiting, slots, machine, checked = list(range(40)), [None] * 4, Engine(model, 4, 32), 0
    while waiting or any(s is not None for s in slots):
        empty = [i for i, s in enumerate(slots) if s is None]
        if waiting and empty and r.random() < 0.7:
            join = empty[: r.randint(1, min(len(empty), len(waiting)))]
            for place in join:
                slots[place] = (waiting.pop(), 0)
            machine.start(join, [rows[slots[i][0]][: prompt[slots[i][0]]] for i in join])
            continue
        running = [i for i, s in enumerate(slots) if s is not None]
        if not waiting and len(running) < len(slots) and running:
            machine.keep(running)
            slots = [slots[i] for i in running]
        fed = [0 if s is None else rows[s[0]][prompt[s[0]] + s[1]] for s in slots]
        x = machine.step(fed)
        for place, s in enumerate(slots):
            if s is None:
                continue
            row, said = s
            slots[place] = (row, said + 1)
            if prompt[row] + said + 1 == len(rows[row]):
                assert torch.allclose(x[place], full_logits(model, rows[row])[-1], atol=2e-5)
                slots[place], checked = None, checked + 1
                machine.stop(place)
    assert checked == 40


@torch.inference_mode()
def test_an_empty_slot_stays_at_its_beginning(model):
    """Else the longest row would be one that is not there, and at last a position behind the cache."""
    machine = Engine(model, 3, 12)
    machine.start([0, 2], [[1, 2, 3], [4, 5]])
    machine.step([7, 0, 8])
    machine.stop(2)
    for _ in range(5):
        machine.step([7, 0, 0])
    assert machine.lengths == [9, 0, 0]
