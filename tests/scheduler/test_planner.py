"""When instances change sides, and when they don't."""

from memserve.scheduler.interface import Ask, Role, SchedulerConfig
from memserve.scheduler.scheduler import Scheduler


def scheduler(*roles: Role, elastic: bool = True) -> Scheduler:
    config = SchedulerConfig(
        block_size=16,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        routing_policy="least-load",
        elastic_roles=elastic,
    )
    made = Scheduler(config)
    for number, role in enumerate(roles):
        made.join(number, role, num_blocks=[10_000], block_bytes=1000, epoch=1)
    return made


def send(
    made: Scheduler, ticket: int, *, num_tokens: int, now: float, max_tokens: int = 16
) -> None:
    ask = Ask(prompt=[ticket] * num_tokens, max_tokens=max_tokens)
    made.dispatched(ticket, 0, ask, made.place(ask, now), now)


def watch(made: Scheduler, start: float, end: float) -> list[tuple[float, int, Role]]:
    """Replan every half a second and do as it says."""
    changes, now = [], start
    while now < end:
        for instance, role in made.replan(now):
            made.set_role(instance, role)
            changes.append((now, instance, role))
        now += 0.5
    return changes


def flood_prefill(made: Scheduler) -> None:
    for ticket in range(40):
        send(made, ticket, num_tokens=4000, now=0.0)


def flood_decode(made: Scheduler) -> None:
    for ticket in range(100, 160):
        send(made, ticket, num_tokens=32, now=0.0, max_tokens=2000)
        made.first_token(ticket, 0.0)


def test_decoders_help_when_prompts_wait_one_at_a_time() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE, Role.DECODE)
    flood_prefill(made)
    changes = watch(made, 0.0, 9.0)
    assert [role for _, _, role in changes] == [Role.MIXED, Role.MIXED]
    assert {instance for _, instance, _ in changes} == {1, 2}
    assert changes[1][0] - changes[0][0] >= 5.0


def test_prefillers_help_when_decoding_is_crowded() -> None:
    made = scheduler(Role.PREFILL, Role.PREFILL, Role.DECODE)
    flood_decode(made)
    assert {role for _, _, role in watch(made, 0.0, 5.0)} == {Role.MIXED}


def test_somebody_is_always_left_on_each_side() -> None:
    for flood in (flood_prefill, flood_decode):
        made = scheduler(Role.MIXED, Role.MIXED, Role.MIXED)
        flood(made)
        assert watch(made, 0.0, 60.0)
        roles = made.roles().values()
        assert any(role.prefills for role in roles)
        assert any(role.decodes for role in roles)


def test_a_short_burst_changes_nothing() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE)
    flood_prefill(made)
    assert watch(made, 0.0, 2.0) == []
    for ticket in range(40):
        made.ended(ticket, 2.0)
    assert watch(made, 2.0, 30.0) == []


def test_roles_that_bind_never_change() -> None:
    made = scheduler(Role.PREFILL, Role.DECODE, elastic=False)
    flood_prefill(made)
    assert watch(made, 0.0, 30.0) == []
