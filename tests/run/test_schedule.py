"""When a run refreshes: K, warm-up, skipped steps, resume, an epoch's remainder."""

import pytest

from llamafactory_ogpsa.run.schedule import Schedule, count_refreshes


def simulate(interval, moves, coverage=None, total=4, schedule=None, start=0):
    """Run a schedule over steps; return the steps that began with a refresh.

    Args:
        interval: K.
        moves: for each step whether the optimizer changed weights.
        coverage: from the number of refreshes so far and whether the weights have ever moved to the tensors covered.
        total: all tensors.
        schedule: one to go on with.
        start: the step to begin at.
    """
    schedule = schedule or Schedule(interval)
    refreshes, ever = [], False
    for step, moved in enumerate(moves, start=start):
        for _ in range(2):  # with an epoch's remainder carried over a step begins twice
            if schedule.is_due(step):
                refreshes.append(step)
                schedule.refreshed(step, total if coverage is None else coverage(len(refreshes), ever), total)
        schedule.stepped(moved)
        ever = ever or moved
    return refreshes


@pytest.mark.parametrize(("interval", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (7, [0]), (100, [0])])
def test_every_k_steps_starting_before_the_first(interval, expected):
    assert simulate(interval, [True] * 7) == expected
    assert count_refreshes(7, interval, repeated=False) == len(expected)


def lora(_, ever):
    """LoRA: half the tensors have a gradient before the weights have moved, all of them after."""
    return 4 if ever else 2


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([True] * 8, [0, 1]),
        ([False] + [True] * 7, [0, 2]),  # warm-up: the first step has learning rate zero
        ([False] * 3 + [True] * 5, [0, 4]),  # or the scaler has skipped three
        ([False] * 8, [0]),
    ],
)
def test_lora_is_refreshed_again_once_the_weights_have_moved(moves, expected):
    assert simulate(30, moves, lora) == expected
    if all(moves):
        assert count_refreshes(8, 30, repeated=True) == len(expected)


def test_a_regular_refresh_before_the_weights_move_is_not_the_last_repeated_one():
    assert simulate(2, [False] * 4 + [True] * 3, lora) == [0, 2, 4, 5, 6]


def test_repeating_ends_where_a_repeated_refresh_brings_nothing():
    """Experts that no reference sample is routed to never get a direction."""
    assert simulate(30, [True] * 8, lambda *_: 3) == [0, 1]
    assert simulate(3, [True] * 8, lambda *_: 3) == [0, 1, 3, 6]


def test_repeating_goes_on_while_it_brings_more():
    assert simulate(30, [True] * 8, lambda count, _: min(count, 4)) == [0, 1, 2, 3]


def test_a_resumed_schedule_goes_on_as_the_first_would_have():
    moves = [False, False, True, True, True, True, True]
    for stop in range(1, 7):
        schedule = Schedule(30)
        first = simulate(30, moves[:stop], lora, schedule=schedule)
        kept = {name: getattr(schedule, name) for name in ("refreshed_at", "moved", "searching", "covered")}
        resumed = Schedule(30, **kept)
        ever = any(moves[:stop])
        second = simulate(30, moves[stop:], lambda _, more, ever=ever: 4 if ever or more else 2, 4, resumed, stop)
        assert first + second == [0, 3]


def test_what_a_run_of_no_or_one_step_costs():
    assert count_refreshes(0, 30, repeated=True) == 0
    assert count_refreshes(1, 30, repeated=True) == 1
    assert count_refreshes(5, 1, repeated=True) == 5
