"""When instances change roles, and when they don't."""

from memserve.messages import StepSample
from memserve.scheduler.cost import StepCosts
from memserve.scheduler.interface import Ask, Role, SchedulerConfig
from memserve.scheduler.scheduler import Scheduler

COSTS = StepCosts(0.015, 0, 5e-5, 7e-5, 0, 0, 3e-8)
"""A step with 2,048 prompt tokens takes ten times as long as one that decodes."""


class Traffic:
    """Sends prompts to a scheduler at a steady rate; each gets its answer, a token at a time."""

    def __init__(self, *roles: Role, elastic: bool = True) -> None:
        self.now = 0.0
        self.changes: list[tuple[float, int, Role]] = []
        self._num_sent = 0
        self._running: list[tuple[int, float]] = []
        self.scheduler = Scheduler(
            SchedulerConfig(
                block_size=16,
                max_num_batched_tokens=2048,
                max_num_seqs=64,
                routing_policy="least-load",
                elastic_roles=elastic,
            )
        )
        for number, role in enumerate(roles):
            self.scheduler.join(number, role, num_blocks=[10_000], block_bytes=1000, epoch=1)
        batches = [StepSample(n, n, d, 900 * d, 0.0) for n in (0, 64, 600, 2048) for d in (0, 1, 9)]
        samples = [
            StepSample(
                n.num_prefill_tokens,
                n.num_prefill_pairs,
                n.num_decodes,
                n.num_decode_pairs,
                COSTS.seconds(n),
            )
            for n in batches[1:]
        ]
        for _ in range(20):
            self.scheduler.learn(0, samples, [])

    def run(
        self, seconds: float, *, rate: float = 0.0, length: int = 2000, answer: int = 256
    ) -> None:
        """Let so much time go by; roles follow the scheduler, which is asked twice a second."""
        for _ in range(round(2 * seconds)):
            self.now += 0.5
            while self._num_sent < rate * self.now:
                self._send(length, answer)
            self._running = [one for one in self._running if not self._ends(*one)]
            for instance, role in self.scheduler.replan(self.now):
                self.scheduler.set_role(instance, role)
                self.changes.append((self.now, instance, role))

    def roles(self) -> list[Role]:
        return sorted(self.scheduler.roles().values())

    def _send(self, length: int, answer: int) -> None:
        self._num_sent += 1
        ticket = self._num_sent
        ask = Ask(prompt=[ticket] * length, max_tokens=answer)
        placement = self.scheduler.place(ask, self.now)
        self.scheduler.dispatched(ticket, 0, ask, placement, self.now)
        self.scheduler.first_token(ticket, self.now)
        self._running.append((ticket, self.now + 0.02 * answer))

    def _ends(self, ticket: int, end: float) -> bool:
        if self.now >= end:
            self.scheduler.ended(ticket, self.now)
        return self.now >= end


def test_one_of_two_prefills_while_long_prompts_disturb_long_answers() -> None:
    traffic = Traffic(Role.MIXED, Role.MIXED)
    traffic.run(20.0, rate=1.8)
    assert traffic.roles() == [Role.DECODE, Role.PREFILL]
    assert len(traffic.changes) == 2
    assert traffic.scheduler.counters.num_role_changes == 2


def test_fixed_roles_are_given_up_where_prompts_are_short() -> None:
    traffic = Traffic(Role.PREFILL, Role.DECODE, Role.DECODE)
    traffic.run(20.0, rate=3.0, length=100)
    assert traffic.roles() == [Role.MIXED] * 3


def test_more_than_all_can_do_is_done_by_all() -> None:
    traffic = Traffic(Role.PREFILL, Role.DECODE, Role.DECODE)
    traffic.run(20.0, rate=60.0, length=2000, answer=8)
    assert traffic.roles() == [Role.MIXED] * 3


def test_a_change_waits_until_it_has_been_wanted_for_a_while() -> None:
    traffic = Traffic(Role.PREFILL, Role.DECODE)
    traffic.run(1.0, rate=6.0, length=100, answer=64)
    traffic.run(20.0)
    assert traffic.changes == [], "what came was too short a burst"


def test_an_end_of_the_traffic_changes_nothing() -> None:
    traffic = Traffic(Role.MIXED, Role.MIXED)
    traffic.run(20.0, rate=1.8)
    before = list(traffic.changes)
    assert before
    traffic.run(100.0)
    assert traffic.changes == before


def test_a_role_set_by_hand_stays_until_there_is_another_decision() -> None:
    traffic = Traffic(Role.MIXED, Role.MIXED)
    traffic.run(20.0, rate=1.8)
    traffic.scheduler.set_role(0, Role.MIXED)
    traffic.run(20.0, rate=1.8)
    assert traffic.scheduler.roles()[0] is Role.MIXED


def test_changes_are_apart() -> None:
    traffic = Traffic(Role.MIXED, Role.MIXED)
    traffic.run(12.0, rate=1.8)
    split = traffic.changes[-1][0]
    traffic.run(60.0, rate=30.0, length=2000, answer=8)
    assert traffic.roles() == [Role.MIXED] * 2
    assert traffic.changes[-1][0] - split >= 5.0


def test_roles_that_bind_never_change() -> None:
    traffic = Traffic(Role.PREFILL, Role.DECODE, elastic=False)
    traffic.run(20.0, rate=3.0, length=100)
    assert traffic.changes == []
