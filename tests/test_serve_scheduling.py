"""The policy of our server: for any traffic, everybody gets a turn, and answers that have begun go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from logo.serve.scheduling import Schedule


@dataclass(eq=False)
class Request:
    """A prompt and the answer that it will have, which comes at a step of the server."""

    comes: int
    prompt: int  # tokens
    answer: int
    prefix: int  # tokens of the prompt that are cached
    read: int = 0
    written: int = 0

    @property
    def unread(self) -> int:
        return self.prompt - self.read

    @property
    def most(self) -> int:
        return self.prompt + self.answer

    @property
    def apart(self) -> bool:
        return self.read > 0 or self.prefix > 0

    @property
    def answering(self) -> bool:
        return self.written > 0


@dataclass
class Simulated:
    """A server that follows the policy, without a model."""

    schedule: Schedule
    waiting: list[Request]
    running: list[Request] = field(default_factory=list)

    def step(self) -> int:
        """Reads prompts, and gives each running answer a token; how many tokens it has read."""
        read = 0
        while True:
            room = self.schedule.room_to_read(read, self.waiting, self.running)
            prompts = self.schedule.next_prompts(room, self.waiting, self.running) if room else []
            if not prompts:
                break
            assert prompts[0] is self.waiting[0]  # nobody passes the first one
            read += self.read(prompts, room)
        for request in self.running:
            request.written += 1
        self.running = [request for request in self.running if request.written < request.answer]
        return read

    def read(self, prompts: Sequence[Request], room: int) -> int:
        for request in prompts:
            request.read = max(request.read, request.prefix)
        counts = [min(request.unread, room) for request in prompts]
        for request, count in zip(prompts, counts, strict=True):
            request.read += count
        begun = [request for request in prompts if not request.unread]
        self.running += begun
        self.waiting = [request for request in self.waiting if request not in begun]
        assert len(self.running) <= self.schedule.rows
        assert len(self.running) * max((one.most for one in self.running), default=0) <= self.schedule.kv_tokens
        return max(counts) * len(counts)  # the shorter ones are padded


LONGEST = 90
requests = st.builds(
    Request,
    comes=st.integers(0, 30),
    prompt=st.integers(1, 60),
    answer=st.integers(1, 30),
    prefix=st.just(0),
) | st.builds(Request, comes=st.integers(0, 30), prompt=st.just(40), answer=st.just(5), prefix=st.integers(1, 39))
schedules = st.builds(
    Schedule, rows=st.integers(1, 6), kv_tokens=st.integers(LONGEST, 400), step_tokens=st.integers(1, 40)
)


@given(schedules, st.lists(requests, min_size=1, max_size=25))
def test_everybody_is_answered_and_no_answer_that_has_begun_is_kept_waiting(
    schedule: Schedule, traffic: list[Request]
) -> None:
    server = Simulated(schedule, [])
    step = 0
    # Each step reads a part of a prompt or writes a token, so that these are enough.
    enough = max(request.comes for request in traffic) + sum(request.most for request in traffic) + 1
    while any(request.written < request.answer for request in traffic):
        server.waiting += [request for request in traffic if request.comes == step]
        answering = [request for request in server.running if request.answering]
        before = [request.written for request in answering]
        read = server.step()
        assert [request.written for request in answering] == [count + 1 for count in before]
        assert not answering or read <= schedule.step_tokens
        step += 1
        assert step <= enough


@given(schedules, st.lists(requests, min_size=1, max_size=25))
def test_a_burst_that_finds_the_server_idle_is_read_before_the_first_tokens(
    schedule: Schedule, burst: list[Request]
) -> None:
    server = Simulated(schedule, list(burst))
    server.step()
    # Until as many run as wait, or there is no room for more.
    is_full = not schedule.next_prompts(schedule.step_tokens, server.waiting, server.running)
    assert len(server.waiting) <= len(burst) / 2 or is_full or any(request.answer == 1 for request in burst)


@given(st.integers(0, 50), st.lists(st.booleans(), max_size=200))
def test_who_waits_for_memory_is_passed_a_limited_number_of_times_and_by_the_base_model_always(
    most_passes: int, needs: list[bool]
) -> None:
    schedule = Schedule(rows=1, kv_tokens=1, most_passes=most_passes)
    passes = 0
    for needs_adapters in needs:
        waits = schedule.waits_for_memory(needs_adapters, True, passes)
        assert waits == (needs_adapters and passes == most_passes)
        passes += needs_adapters and not waits
        assert not schedule.waits_for_memory(needs_adapters, False, passes)
    assert passes == min(sum(needs), most_passes)
