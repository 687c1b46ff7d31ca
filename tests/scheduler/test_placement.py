"""Where prompts go, by load, role and what was sent where before."""

import pytest

from memserve.scheduler.placement import LeastWork, Load, Placement, Role

BLOCK = 4


def loads(*roles: Role) -> list[Load]:
    return [Load(number, role, num_cache_blocks=100) for number, role in enumerate(roles)]


def test_prefill_and_decode_instances_are_told_apart() -> None:
    placed = LeastWork(BLOCK).place([1] * 9, "", loads(Role.DECODE, Role.PREFILL))
    assert placed == Placement(prefill=1, decode=0, num_uncached_tokens=9)


def test_a_mixed_instance_keeps_what_it_prefills() -> None:
    placed = LeastWork(BLOCK).place([1] * 9, "", loads(Role.MIXED, Role.DECODE))
    assert placed == Placement(prefill=0, decode=0, num_uncached_tokens=9)


def test_equal_loads_take_turns() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED, Role.MIXED, Role.MIXED)
    chosen = [policy.place([number] * 9, "", instances).prefill for number in range(6)]
    assert sorted(chosen[:3]) == sorted(chosen[3:]) == [0, 1, 2]


def test_a_prompt_goes_where_its_prefix_was_computed() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED, Role.MIXED)
    first = policy.place(list(range(40)), "", instances)
    policy.place(list(range(50, 60)), "", instances)
    second = policy.place([*range(40), 99], "", instances)
    assert second == Placement(first.prefill, first.decode, num_uncached_tokens=1)


def test_a_cached_prefix_does_not_outweigh_a_long_queue() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED, Role.MIXED)
    first = policy.place(list(range(40)), "", instances)
    instances[first.prefill].num_prefill_tokens = 1000
    assert policy.place(list(range(40)), "", instances).prefill != first.prefill


def test_another_salt_is_another_prompt() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED)
    policy.place(list(range(40)), "a", instances)
    assert policy.place(list(range(40)), "b", instances).num_uncached_tokens == 40
    assert policy.place(list(range(40)), "a", instances).num_uncached_tokens == 4


def test_what_the_instance_must_have_evicted_is_forgotten() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED)
    instances[0].num_cache_blocks = 10
    policy.place(list(range(40)), "", instances)
    policy.place(list(range(100, 140)), "", instances)
    assert policy.place(list(range(40)), "", instances).num_uncached_tokens == 40


def test_a_forgotten_cache_is_no_reason_to_go_there() -> None:
    policy, instances = LeastWork(BLOCK), loads(Role.MIXED)
    policy.place(list(range(40)), "", instances)
    policy.forget(0)
    assert policy.place(list(range(40)), "", instances).num_uncached_tokens == 40


def test_without_a_decoder_there_is_no_placement() -> None:
    with pytest.raises(LookupError):
        LeastWork(BLOCK).place([1], "", loads(Role.PREFILL))
