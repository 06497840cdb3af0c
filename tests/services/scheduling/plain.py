"""The event loop of jobs written out plainly: lists, no heap, nothing compiled. What event_loops.py is held to."""

import numpy as np


def serve_plainly(arrivals_s, work_s, base, *, ageing, preemption, num_servers, timeout_s, backoff_s, retries, drops):
    """The [n] last attempts' (start, begin, finish), the tries, and the seconds that servers were busy."""
    coming = [(t, i, 0) for i, t in enumerate(arrivals_s)]  # (start, request, tries before)
    waiting, running, attempts, busy_s = [], [], [], 0.0

    def key_now(a, now):
        done = now - a["since"] if preemption == 2 and a in running else 0.0
        return a["key"] - done

    while True:
        times = [c[0] for c in coming] + [a["since"] + a["left"] for a in running]
        times += [a["start"] + timeout_s for a in attempts if not a["over"]]
        if not times or min(times) == np.inf:
            break
        now = min(times)
        for a in [a for a in running if a["since"] + a["left"] <= now]:
            running.remove(a)
            busy_s += a["left"]
            a["finish"], a["left"] = now, 0.0
        for a in attempts:
            if not a["over"] and a["start"] + timeout_s <= now:
                a["over"] = True
                if a["finish"] > now and a["tries"] < retries:
                    coming.append((a["start"] + timeout_s + backoff_s, a["request"], a["tries"] + 1))
        for c in sorted(c for c in coming if c[0] <= now):
            coming.remove(c)
            start, request, tries = c
            a = dict(
                start=start, request=request, tries=tries, key=base[request] + ageing * start, left=work_s[request]
            )
            a |= dict(begin=np.inf, finish=np.inf, since=np.inf, over=False, number=len(attempts))
            attempts.append(a)
            waiting.append(a)
        if drops:
            waiting = [a for a in waiting if now < a["start"] + timeout_s]
        while waiting:
            first = min(waiting, key=lambda a: (a["key"], a["number"]))
            if len(running) == num_servers:
                worst = max(running, key=lambda a: (key_now(a, now), a["number"]))
                if preemption == 0 or key_now(worst, now) <= first["key"]:
                    break
                worst["key"] = key_now(worst, now)
                busy_s += now - worst["since"]
                worst["left"] -= now - worst["since"]
                running.remove(worst)
                waiting.append(worst)
            waiting.remove(first)
            first["since"], first["begin"] = now, min(first["begin"], now)
            running.append(first)
    last = {a["request"]: a for a in attempts}
    rows = [last[i] for i in range(len(arrivals_s))]
    return [np.asarray([a[name] for a in rows]) for name in ("start", "begin", "finish", "tries")], busy_s
