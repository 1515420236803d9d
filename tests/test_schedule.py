"""The learning rate: rises, stays, falls along four shapes; the line that says so; the plot."""

import math

import pytest

import schedule
from schedule import SHAPES, decay_start, describe, wsd


def test_the_schedule_rises_stays_and_falls():
    rates = [wsd(step, 200, 0.05, 0.3) for step in range(200)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:141] == [1.0] * 132
    assert rates[141:] == pytest.approx([0.01 + 0.99 * (200 - i) / 60 for i in range(141, 200)])
    assert wsd(0, 200, 0, 0) == wsd(199, 200, 0, 0) == 1.0  # no warm-up, no decay
    assert wsd(0, 1, 0.02, 0.4) == 1.0
    assert wsd(0, 1000, 0.9, 0) == 0.01 and wsd(8, 1000, 0.9, 0) == 0.01 and wsd(17, 1000, 0.9, 0) == 0.02


@pytest.mark.parametrize("shape,middle,tail", [
    ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0244717), ("exponential", math.sqrt(2) - 1, 0.0717735),
    ("minus_sqrt", 1 - math.sqrt(0.5), 0.0513167),
])  # fmt: skip
def test_the_shapes(shape, middle, tail):
    rates = [wsd(step, 1000, 0.02, 0.18, shape=shape) for step in range(1000)]
    assert rates[19:821] == [1.0] * 802 and rates[821] < 1
    assert rates[910] == pytest.approx(0.01 + 0.99 * middle)  # half of the fall
    assert rates[982] == pytest.approx(0.01 + 0.99 * tail, abs=1e-6)  # nine tenths
    falling = rates[820:]
    assert all(a > b for a, b in zip(falling, falling[1:]))
    assert 0.01 < rates[-1] < 0.02 and SHAPES[shape](1.0) == pytest.approx(0, abs=1e-15) and SHAPES[shape](0.0) == 1
    assert [wsd(t, 1000, 0.02, 0.18, 0.5, shape) for t in range(820, 1000)] == pytest.approx(
        [0.5 + (rate - 0.01) / 0.99 * 0.5 for rate in falling]  # another floor: the same way, squeezed
    )


def test_a_cosine_over_the_whole_run():
    rates = [wsd(step, 500, 0.02, 0.98, shape="cosine") for step in range(500)]
    assert rates[9] == rates[10] == 1.0 == max(rates)
    assert rates[255] == pytest.approx(0.505) and rates[499] == pytest.approx(0.01, abs=1e-4)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 999, 1700])
@pytest.mark.parametrize("decay", [0, 0.001, 0.18, 0.4, 0.7, 0.98, 1])
def test_the_fall_begins_where_it_is_said_to(steps, decay):
    rates, start = [wsd(step, steps, 0, decay) for step in range(steps)], decay_start(steps, decay)
    below = [step for step, rate in enumerate(rates) if rate < 1]
    if start is None:
        assert not below and decay * steps <= 1
    else:
        assert start <= below[0] <= start + 1 and 0 <= start < steps and start >= steps - decay * steps - 1e-9


def test_the_line_for_people():
    whole = describe(1000, 0.02, 0.18, "cosine", [0, 600, 900])
    assert whole == (
        "rate rises to step 20 (2%), stays to step 820 (82%), falls to step 1000 (100%), cosine, to a hundredth; "
        "blend 1 from step 0, 2 from step 600 (60%), 3 from step 900 (90%): the fall begins in blend 2"
    )
    assert describe(1000, 0, 0) == "rate stays to the end, step 1000 (100%)"
    assert describe(1000, 0.1, 0.9) == "rate rises to step 100 (10%), falls to step 1000 (100%), linear, to a hundredth"
    assert describe(50, 0, 1, "minus_sqrt") == "rate falls to step 50 (100%), minus_sqrt, to a hundredth"


def test_the_plot_draws_every_shape_and_the_control():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    schedule.draw(axis, 100, 0.02, 0.18, phases=[0, 60, 90])
    labels = [line.get_label() for line in axis.lines]
    assert labels[:5] == [*SHAPES, "cosine over the whole run"]
    assert axis.lines[3].get_ydata()[91] == wsd(91, 100, 0.02, 0.18, shape="minus_sqrt")
    assert [line.get_xdata()[0] for line in axis.lines[5:]] == [60, 90]
    plt.close(figure)
