"""The compiled event loops: clients that arrive, give up and try again, a heap of those who wait, and the servers.

A step of an event loop is a few dozen machine instructions with a branch in each, which neither NumPy nor XLA has a
form for; Numba compiles it. All loops are in this file because Numba's cache follows a function's own file only.
`jobs.py` and `batching.py` check what comes in and say what comes out.

An attempt is one try of a request. Attempts are numbered as they start, so that a lower number came earlier; they are
served in the order of key, then number, where key = base[request] + ageing * start.
"""

from typing import NamedTuple

import numba
import numpy as np

# Who takes a server from a running job: nobody; who has a lower key; the same, and work done comes off the key.
NO_PREEMPTION, BY_KEY, BY_WORK_LEFT = range(3)
_NEW, _GIVES_UP, _RETRY, _NUM_RETRIES, NUM_ATTEMPTS = range(5)  # places of `Clients.marks`

compiled = numba.njit(cache=True)


class Clients(NamedTuple):
    """Where the clients stand. arrivals_s float64 [n] ascending. A client gives up timeout_s after an attempt's start
    (infinite: never) and tries again backoff_s later, max_retries times.

    Of each attempt, [n (1 + max_retries)]: request, tries (attempts before it), start_s, begin_s (first served;
    infinite: never), finish_s. retries: attempts that are tried again, in order. marks int64 [5]: how far each list is.
    """

    arrivals_s: np.ndarray
    timeout_s: float
    backoff_s: float
    max_retries: int
    request: np.ndarray
    tries: np.ndarray
    start_s: np.ndarray
    begin_s: np.ndarray
    finish_s: np.ndarray
    retries: np.ndarray
    marks: np.ndarray


def new_clients(arrivals_s: np.ndarray, timeout_s: float, backoff_s: float, max_retries: int) -> Clients:
    """Before the first event."""
    size = len(arrivals_s) * (1 + max_retries)
    whole = lambda length: np.zeros(length, np.int64)
    never = lambda: np.full(size, np.inf)
    return Clients(
        arrivals_s,
        float(timeout_s),
        float(backoff_s),
        int(max_retries),
        whole(size),
        whole(size),
        never(),
        never(),
        never(),
        whole(size),
        whole(5),
    )


@compiled
def _retry_s(c):
    """When the next retry in the list starts."""
    return c.start_s[c.retries[c.marks[_RETRY]]] + c.timeout_s + c.backoff_s


@compiled
def next_client_s(c):
    """Time of the clients' next event, infinite where there is none."""
    time = np.inf
    if c.marks[_NEW] < c.arrivals_s.size:
        time = c.arrivals_s[c.marks[_NEW]]
    if c.marks[_GIVES_UP] < c.marks[NUM_ATTEMPTS]:
        time = min(time, c.start_s[c.marks[_GIVES_UP]] + c.timeout_s)
    if c.marks[_RETRY] < c.marks[_NUM_RETRIES]:
        time = min(time, _retry_s(c))
    return time


@compiled
def client_event(c):
    """Takes the clients' next event and returns the attempt that it starts, -1 if none.

    An attempt gives up at its timeout unless finish_s says that it was answered until then; what the server does later
    must not be entered before.
    """
    time = next_client_s(c)
    attempt = c.marks[_GIVES_UP]
    if attempt < c.marks[NUM_ATTEMPTS] and c.start_s[attempt] + c.timeout_s <= time:
        c.marks[_GIVES_UP] += 1
        if c.finish_s[attempt] > time and c.tries[attempt] < c.max_retries:
            c.retries[c.marks[_NUM_RETRIES]] = attempt
            c.marks[_NUM_RETRIES] += 1
        return -1
    attempt = c.marks[NUM_ATTEMPTS]
    c.marks[NUM_ATTEMPTS] += 1
    if c.marks[_RETRY] < c.marks[_NUM_RETRIES] and _retry_s(c) <= time:
        before = c.retries[c.marks[_RETRY]]
        c.marks[_RETRY] += 1
        c.request[attempt] = c.request[before]
        c.tries[attempt] = c.tries[before] + 1
    else:
        c.request[attempt] = c.marks[_NEW]
        c.marks[_NEW] += 1
    c.start_s[attempt] = time
    return attempt


@compiled
def push(keys, items, size, key, item):
    """Into the binary heap of (key, item) in keys[:size], items[:size]; returns the new size."""
    place = size
    while place > 0:
        parent = (place - 1) // 2
        if keys[parent] < key or (keys[parent] == key and items[parent] < item):
            break
        keys[place], items[place] = keys[parent], items[parent]
        place = parent
    keys[place], items[place] = key, item
    return size + 1


@compiled
def drop_first(keys, items, size):
    """Takes the heap's first, which the caller has read at place 0; returns the new size."""
    size -= 1
    key, item = keys[size], items[size]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (keys[right] < keys[child] or (keys[right] == keys[child] and items[right] < items[child])):
            child = right
        if key < keys[child] or (key == keys[child] and item < items[child]):
            break
        keys[place], items[place] = keys[child], items[child]
        place = child
    keys[place], items[place] = key, item
    return size


@compiled
def run_servers(c, work_s, base, ageing, preemption, drops, num_servers):
    """Equal servers of one job each. drops: a client that has left is taken out of the queue (not out of service).
    A job that lost its server goes on later from where it was. Returns the seconds that servers were busy."""
    keys, items, size = np.empty(c.start_s.size), np.empty(c.start_s.size, np.int64), 0
    left_s = np.empty(c.start_s.size)
    job, key_of = np.full(num_servers, -1), np.empty(num_servers)
    since_s, until_s = np.zeros(num_servers), np.full(num_servers, np.inf)
    busy_s = 0.0
    while True:
        server = np.argmin(until_s)
        now = min(until_s[server], next_client_s(c))
        if now == np.inf:
            return busy_s
        if until_s[server] <= now:
            c.finish_s[job[server]] = now
            busy_s += now - since_s[server]
            job[server], until_s[server] = -1, np.inf
        else:
            attempt = client_event(c)
            if attempt >= 0:
                request = c.request[attempt]
                left_s[attempt] = work_s[request]
                size = push(keys, items, size, base[request] + ageing * c.start_s[attempt], attempt)
        if next_client_s(c) <= now or until_s.min() <= now:
            continue  # all that happens at one time is known before anybody is chosen
        while size > 0:
            attempt, key = items[0], keys[0]
            if drops and now >= c.start_s[attempt] + c.timeout_s:
                size = drop_first(keys, items, size)
                continue
            server = _open_server(job, key_of, since_s, now, key, preemption)
            if server < 0:
                break
            size = drop_first(keys, items, size)
            if job[server] >= 0:
                busy_s += now - since_s[server]
                left_s[job[server]] -= now - since_s[server]
                size = push(keys, items, size, _key_now(key_of, since_s, now, server, preemption), job[server])
            c.begin_s[attempt] = min(c.begin_s[attempt], now)
            job[server], key_of[server] = attempt, key
            since_s[server], until_s[server] = now, now + left_s[attempt]


@compiled
def _key_now(key_of, since_s, now, server, preemption):
    """A running job's key: where the work left counts, what was done comes off it."""
    return key_of[server] - (now - since_s[server] if preemption == BY_WORK_LEFT else 0.0)


@compiled
def _open_server(job, key_of, since_s, now, key, preemption):
    """A server that is idle, or else the one whose job has the highest key if that is above `key`, among equals the job
    that came last; -1: none."""
    worst, found = key, -1
    for server in range(job.size):
        if job[server] < 0:
            return server
        if preemption != NO_PREEMPTION:
            its = _key_now(key_of, since_s, now, server, preemption)
            if its > worst or (found >= 0 and its == worst and job[server] > job[found]):
                worst, found = its, server
    return found


@compiled
def run_batches(arrivals_s, batch_s, row_s, max_batch, begin_s, finish_s):
    """A server that takes all who wait, at most max_batch, first come first served, for batch_s + row_s * rows.
    Returns the number of batches."""
    now, first, batches = 0.0, 0, 0
    while first < arrivals_s.size:
        now = max(now, arrivals_s[first])
        end = first
        while end < arrivals_s.size and end - first < max_batch and arrivals_s[end] <= now:
            begin_s[end] = now
            end += 1
        now += batch_s + row_s * (end - first)
        finish_s[first:end] = now
        first = end
        batches += 1
    return batches


class Steps(NamedTuple):
    """What a language model's steps take. Reading a chunk of t prompt tokens: chunk_s + chunk_token_s t; a token for n
    rows with k tokens of context in all: step_s + step_row_s n + step_kv_s k; to give a slot to a request: join_s."""

    chunk_s: float
    chunk_token_s: float
    step_s: float
    step_row_s: float
    step_kv_s: float
    join_s: float = 0.0


class Batcher(NamedTuple):
    """num_slots rows at a time whose prompts and answers fit kv_tokens together; prompts are read chunk_tokens at a
    time, at most chunks_per_step chunks between two steps. gang: static batching, see batching.py."""

    num_slots: int
    kv_tokens: float
    chunk_tokens: int
    chunks_per_step: int
    gang: bool


@compiled
def run_batcher(c, prompt_tokens, output_tokens, base, ageing, drops, batcher, steps, first_s):
    """Continuous or static batching (batching.py). first_s [attempts]: when the first token is there.
    Returns (seconds that the server was busy, steps, rows of all steps).

    Steps between which nothing can happen are taken at once: 10^6 requests draw 10^8 tokens.
    """
    keys, items, size = np.empty(c.start_s.size), np.empty(c.start_s.size, np.int64), 0
    job = np.full(batcher.num_slots, -1)
    unread = np.zeros(batcher.num_slots, np.int64)
    first_step, last_step = np.zeros(batcher.num_slots, np.int64), np.zeros(batcher.num_slots, np.int64)
    reading, num_read, num_to_read = np.zeros(batcher.num_slots, np.int64), 0, 0  # a ring of slots
    used, reserved, rows, kv = 0, 0, 0, 0
    now, busy_s, num_steps, num_rows = 0.0, 0.0, 0, 0
    while True:
        while next_client_s(c) <= now:
            attempt = client_event(c)
            if attempt >= 0:
                key = base[c.request[attempt]] + ageing * c.start_s[attempt]
                size = push(keys, items, size, key, attempt)
        began = now
        if used == 0 or not batcher.gang:
            while size > 0 and used < batcher.num_slots:
                attempt = items[0]
                request = c.request[attempt]
                gone = drops and began >= c.start_s[attempt] + c.timeout_s
                tokens = prompt_tokens[request] + output_tokens[request]
                if not gone and reserved + tokens > batcher.kv_tokens:
                    break  # nobody overtakes whom the memory keeps waiting
                size = drop_first(keys, items, size)
                if gone:
                    continue
                slot = np.argmin(job)  # -1: free
                job[slot], unread[slot], first_step[slot] = attempt, prompt_tokens[request] - 1, -1
                reserved, used = reserved + tokens, used + 1
                if unread[slot] > 0:
                    reading[num_to_read % batcher.num_slots] = slot
                    num_to_read += 1
                c.begin_s[attempt] = began
                now += steps.join_s
        if used == 0:
            now = next_client_s(c)
            if now == np.inf:
                return busy_s, num_steps, num_rows
            continue
        chunks = 0
        while num_read < num_to_read and chunks < batcher.chunks_per_step:
            slot = reading[num_read % batcher.num_slots]
            tokens = min(batcher.chunk_tokens, unread[slot])
            unread[slot] -= tokens
            now += steps.chunk_s + steps.chunk_token_s * tokens
            chunks += 1
            num_read += unread[slot] == 0
        for slot in range(job.size):
            if job[slot] >= 0 and unread[slot] == 0 and first_step[slot] < 0:
                request = c.request[job[slot]]
                first_step[slot], last_step[slot] = num_steps, num_steps + output_tokens[request]
                rows, kv = rows + 1, kv + prompt_tokens[request] - 1
        if rows > 0:
            before = num_steps
            step_s = steps.step_s + steps.step_row_s * rows + steps.step_kv_s * kv
            growth_s = steps.step_kv_s * rows  # of step_s from one to the next
            next_end, last_end = 2**62, 0
            for slot in range(job.size):
                if job[slot] >= 0 and unread[slot] == 0:
                    next_end, last_end = min(next_end, last_step[slot]), max(last_end, last_step[slot])
                    if first_step[slot] == before:
                        first_s[job[slot]] = now + step_s
            count = (last_end if batcher.gang else next_end) - before
            if num_read < num_to_read:
                count = 1
            elif used < batcher.num_slots:
                count = min(count, _steps_until(next_client_s(c) - now, step_s, growth_s))
            now += count * step_s + growth_s * (count * (count - 1) / 2)
            num_steps, num_rows, kv = num_steps + count, num_rows + count * rows, kv + count * rows
            for slot in range(job.size):
                ends = num_steps == (last_end if batcher.gang else last_step[slot])
                if job[slot] >= 0 and unread[slot] == 0 and ends:
                    request = c.request[job[slot]]
                    c.finish_s[job[slot]] = now
                    tokens = prompt_tokens[request] + output_tokens[request]
                    reserved, used, rows = reserved - tokens, used - 1, rows - 1
                    kv -= prompt_tokens[request] - 1 + num_steps - first_step[slot]
                    job[slot] = -1
        busy_s += now - began


@compiled
def _steps_until(gap_s, step_s, growth_s):
    """Steps until one ends gap_s from now or later, where each takes growth_s more than the one before."""
    if gap_s == np.inf:
        return 2**62
    if growth_s == 0:
        return max(1, int(np.ceil(gap_s / step_s)))
    half = step_s / growth_s - 0.5
    return max(1, int(np.ceil(np.sqrt(half * half + 2 * gap_s / growth_s) - half)))
