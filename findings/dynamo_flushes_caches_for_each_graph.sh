#!/usr/bin/env bash
# torch 2.13.0: each graph that torch.compile captures, for any backend, pays tens of milliseconds for a number in a
# debug log. Once its guards are built, Dynamo calls profile_guard_manager, which flushes the caches of the CPU so that
# one evaluation of them is timed cold, and hands the microseconds to log.debug and to a metric, listened to or not.
#
# Expected: what is measured for a log costs nothing while the log is off, or about what it measures.
# Seen, on two cores: 20 functions of one addition with backend="eager" take 44 ms each to compile, of which 23 ms go
# into learning that the guards of one take 76 us.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'CODE'
import time

import torch
import torch._dynamo.guards as guards

spent, latencies = [], []
measure = guards.profile_guard_manager


def timed(*args):
    start = time.perf_counter()
    latencies.append(measure(*args))
    spent.append(time.perf_counter() - start)
    return latencies[-1]


guards.profile_guard_manager = timed
functions = [eval(f"lambda x: x + {number}") for number in range(21)]
torch.compile(functions[0], backend="eager")(torch.ones(2))  # imports
spent.clear()
latencies.clear()
start = time.perf_counter()
for function in functions[1:]:
    torch.compile(function, backend="eager")(torch.ones(2))
whole = time.perf_counter() - start
each, guard = sum(spent) / len(spent), sum(latencies) / len(latencies) * 1e-6
print(f"torch {torch.__version__}: {len(spent)} graphs, {1e3 * whole / len(spent):.1f} ms each")
print(f"  of it {1e3 * each:.1f} ms to measure that the guards of one take {1e6 * guard:.1f} us")
assert len(spent) == 20, "it is not called once a graph any more"
assert each > 20 * guard and each > 1e-3, "it does not cost much more than what it measures any more"
CODE
