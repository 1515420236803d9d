"""engine.py: a row in a slot is the row alone, whoever sits beside it, came before it, or leaves.

With impl triton the kernels run in Triton's interpreter, one program after another (tests/conftest.py); on a GPU that
is the business of the tests marked gpu, at the end.
"""

import copy
import random
from dataclasses import replace

import pytest
import torch
from reference import ours

import engine
from engine import Engine
from model import PRESETS, build
from quantize import quantize_

PROMPTS = [[3, 40, 60], list(range(5, 45)), [9], [7, 8] * 9, [61, 2, 33, 4, 5]]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU, in Triton's interpreter")


@pytest.fixture
def model(request):
    """The plain one; with impl triton one layer of each kind, because the interpreter takes its time."""
    if getattr(request, "param", "torch") == "torch":
        return ours(vocab_size=64, seed=3).eval()
    pytest.importorskip("triton")
    return ours(vocab_size=64, seed=3, hybrid_override_pattern="M*-").eval().use("triton")


def full_logits(model, ids):
    """The logits at every position of a row, from one full forward; on a CPU the plain one."""
    if model.impl == "triton" and model.lm_head.weight.device.type == "cpu":
        model = copy.deepcopy(model).use("torch")
    with torch.inference_mode():
        return model(torch.tensor([ids], device=model.lm_head.weight.device))[0]


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
@pytest.mark.parametrize(  # prompts longer than a piece are read alone, in their slot
    "model, piece",
    [("torch", 1), ("torch", 7), ("torch", 1024), pytest.param("triton", 30, marks=interpreted)],
    indirect=["model"],
)
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
@pytest.mark.parametrize(
    "model, together",
    [("torch", False), ("torch", True), pytest.param("triton", False, marks=interpreted)],
    indirect=["model"],
)
def test_nothing_is_left_of_the_row_before(model, together):
    """A slot that was full of large numbers says the same as a fresh one."""
    machine = Engine(model, 3, 60)
    machine.start([0, 1, 2], PROMPTS[:3])
    for layer in filter(None, machine.cache.layers):
        for name, tensor in vars(layer).items():
            tensor[1:] = 1e4 if name in ("k", "v") else torch.nan  # of a row whose states overflowed
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


@torch.inference_mode()
@pytest.mark.parametrize("model", ["torch", pytest.param("triton", marks=interpreted)], indirect=True)
def test_rows_that_are_kept_stay_where_they_are(model):
    """Four slots become two: rows 1 and 3 go on in the same memory, and a new row can start beside them."""
    machine = Engine(model, 4, 20)
    prompts = [[3, 40, 60], [9], [7, 8, 7], [61, 2, 33, 4, 5]]
    machine.start(range(4), prompts)
    first = walk(model, machine, {1: NEXT[1], 3: NEXT[3]}, 2)
    places = [t.data_ptr() for layer in filter(None, machine.cache.layers) for t in vars(layer).values()]
    machine.keep([1, 3])
    assert machine.lengths == [3, 7] and machine.cache.batch_size == 2
    assert places == [t.data_ptr() for layer in filter(None, machine.cache.layers) for t in vars(layer).values()]
    then = walk(model, machine, {0: NEXT[1][2:], 1: NEXT[3][2:]}, 2)
    for old, new in ((1, 0), (3, 1)):
        full = full_logits(model, prompts[old] + NEXT[old])
        for i, x in enumerate(first[old] + then[new]):
            assert torch.allclose(x, full[len(prompts[old]) + i], atol=2e-5), (old, i)
    x = machine.start([0], [[11, 12]])
    assert torch.allclose(x[0], full_logits(model, [11, 12])[-1], atol=2e-5)
    x = machine.step([13, 14])
    assert torch.allclose(x[0], full_logits(model, [11, 12, 13])[-1], atol=2e-5)
    assert torch.allclose(x[1], full_logits(model, prompts[3] + NEXT[3] + [14])[-1], atol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize(
    "rows, expected",
    [(7, [(2, 3), (3, 5), (1, 20), (1, 20), (1, 18)]), (2, [(2, 3), (2, 5), (1, 20), (1, 20), (1, 18), (1, 4)])],
)
def test_prompts_are_read_together_up_to_a_piece(model, monkeypatch, rows, expected):
    """Padding counts, and so does the memory of a cache of their own: here it may have 7 rows or 2. A prompt longer
    than a piece is read in pieces."""
    monkeypatch.setattr(engine, "work_bytes", lambda *a, **k: rows)
    monkeypatch.setattr(engine, "row_bytes", lambda *a, **k: 1)
    lengths, read, features = [3, 40, 1, 18, 5, 4, 4], [], model.features
    monkeypatch.setattr(model, "features", lambda ids, *others: read.append(tuple(ids.shape)) or features(ids, *others))
    prompts = [[(7 * i + j) % 64 for j in range(length)] for i, length in enumerate(lengths)]
    x = Engine(model, 7, 50, piece=20).start(range(7), prompts)
    assert read == expected
    monkeypatch.undo()
    for logits, prompt in zip(x, prompts):
        assert torch.allclose(logits, full_logits(model, prompt)[-1], atol=2e-5)


@torch.inference_mode()
def test_a_full_slot_is_an_error(model):
    machine = Engine(model, 3, 6)
    machine.start([0, 2], [[1, 2, 3], [4, 5, 6, 7, 8]])
    machine.step([1, 1, 1])
    with pytest.raises(ValueError, match="slot 2 is full: it has 6 positions"):
        machine.step([1, 1, 1])
    assert machine.lengths == [4, 0, 6]
    machine.stop(2)
    x = machine.step([5, 1, 1])
    assert torch.allclose(x[0], full_logits(model, [1, 2, 3, 1, 5])[-1], atol=2e-5)
    for prompt in ([1] * 7, []):
        with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens does not fit slots of 6 positions"):
            machine.start([1], [prompt])


@torch.inference_mode()
def test_tokens_may_be_a_tensor(model):
    found = []
    for form in (list, torch.tensor, lambda tokens: torch.tensor(tokens, dtype=torch.int32)):
        machine = Engine(model, 3, 50)
        machine.start([0, 2], [PROMPTS[0], PROMPTS[3]])
        found.append(torch.stack([machine.step(form([i, 5, 9 + i])).clone() for i in range(3)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.inference_mode()
def test_a_row_alone_and_among_sixty_four_others_of_other_lengths(model):
    r = random.Random(7)
    rows = [[r.randrange(64) for _ in range(r.randint(1, 60))] for _ in range(64)]
    crowd, alone = Engine(model, 64, 80), Engine(model, 1, 80)
    first = crowd.start(range(64), rows)
    for i in range(4):
        tokens = [r.randrange(64) for _ in rows]
        together = crowd.step(tokens).clone()
        for slot in (0, 31, 63):
            rows[slot].append(tokens[slot])
            x = alone.start([0], [rows[slot][:-1]])
            assert i or torch.allclose(x[0], first[slot], atol=2e-5)
            assert torch.allclose(alone.step(tokens[slot : slot + 1])[0], together[slot], atol=2e-5), (slot, i)


@torch.inference_mode()
def test_three_hundred_steps_equal_the_full_forward(model):
    r = random.Random(8)
    row = [r.randrange(64) for _ in range(301)]
    machine = Engine(model, 2, 301)
    machine.start([1], [row[:1]])
    found = torch.stack([machine.step([0, token])[1].clone() for token in row[1:]])
    assert (found - full_logits(model, row)[1:]).abs().max() < 2e-5


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: layers of the released 9B's width, bfloat16, the kernels, recorded steps.
# ---------------------------------------------------------------------------------------------------------------------


def wide_model(pattern, int8=False):
    torch.manual_seed(0)
    config = replace(PRESETS["nano-9b"], hybrid_override_pattern=pattern, vocab_size=4096)
    model = build(config, "cuda", torch.bfloat16).eval().use("triton")
    return quantize_(model) if int8 else model


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_recorded_steps_are_the_steps_to_the_bit(int8):
    """Rows stop, start and are kept in between."""
    model = wide_model("M-*M", int8)

    def life(graph):
        r, machine, found = random.Random(9), Engine(model, 6, 700, graph=graph), []

        def steps(n):
            for i in range(n):
                tokens = [r.randrange(4096) for _ in machine.lengths]
                x = machine.step(tokens if i % 2 else torch.tensor(tokens, device="cuda"))
                found.extend(x[slot].clone() for slot, length in enumerate(machine.lengths) if length)

        def start(*slots):
            for slot in slots:
                prompt = [r.randrange(4096) for _ in range(r.choice([1, 5, 64, 200, 500]))]
                found.append(machine.start([slot], [prompt])[0].clone())

        start(0, 1, 2, 4)
        steps(20)
        machine.stop(1)
        start(5, 1)
        steps(20)
        machine.stop(4)
        steps(3)
        machine.keep([1, 2, 5])
        steps(20)
        machine.keep([2])
        start(0)
        steps(5)
        assert (machine._graph is not None) == graph
        return found

    expected, recorded = life(False), life(True)
    assert len(expected) == len(recorded) > 200
    assert all(torch.equal(a, b) for a, b in zip(expected, recorded))
    assert all(x.isfinite().all() for x in recorded)


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("pattern", ["M-M-", "M-*M"])
@pytest.mark.parametrize("count", [2, 16, 64])
@torch.inference_mode()
def test_a_row_among_others_is_the_row_alone(count, pattern, int8):
    """To the bit up to sixteen rows, which the kernels pad a single one to. Attention may round another way: its
    queries, keys and values are PyTorch's products, and it cuts a row into fewer parts where there are more rows."""
    model, r = wide_model(pattern, int8), random.Random(10)
    rows = [[r.randrange(4096) for _ in range(r.randint(1, 600))] for _ in range(count)]
    crowd, alone = Engine(model, count, 700), Engine(model, 1, 700)
    for slot, row in enumerate(rows):
        crowd.start([slot], [row])
    alone.start([0], [rows[-1]])
    for _ in range(30):
        tokens = [r.randrange(4096) for _ in rows]
        together, x = crowd.step(tokens)[-1], alone.step(tokens[-1:])[0]
        assert (together - x).norm() < 3e-2 * x.norm()
        assert torch.equal(together, x) or count > 16 or "*" in pattern


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_two_thousand_recorded_steps_say_what_the_full_forward_says(int8):
    """Kullback-Leibler divergence in nats a token, on random tokens: small, and no larger late than early."""
    model = wide_model("M-M*-M-", int8)
    row = torch.randint(0, 4096, (2049,)).tolist()
    machine = Engine(model, 1, 2049)
    machine.start([0], [row[:1]])
    log_q = torch.stack([machine.step([token])[0].clone() for token in row[1:]]).log_softmax(-1)
    log_p = full_logits(model, row)[1:].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert -(log_p.exp() * log_p).sum(-1).mean() < 8.2  # it has opinions: no choice at all would be 8.3 nats
    assert kl.mean() < 1e-3 and kl[1024:].mean() < 1.5 * kl[:1024].mean()
