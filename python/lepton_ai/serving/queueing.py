"""Queueing formulas: how long requests wait for replicas, and how many replicas a load needs (M/M/c).

A load is in Erlang: arrivals a second times the seconds that a replica needs for one, which is by Little's law (Little,
"A proof for the queuing formula L = λW", Operations Research 9, 1961) the mean number of busy replicas.
"""

import math


def _erlang_b(load: float, servers: int) -> float:
    """Chance that all servers of a system without a queue are busy; by the recursion over servers, which is stable."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked


def erlang_c(load: float, servers: int) -> float:
    """Chance that a request has to wait: Poisson arrivals, exponential service, `servers` servers, `load` Erlang.

    1.0 where the servers can not keep up. Source: Erlang, "Solution of some problems in the theory of probabilities of
    significance in automatic telephone exchanges", 1917; with the recursion of Cooper, "Introduction to Queueing
    Theory", 1981. Raises ValueError for a load below 0 or fewer than 1 server.
    """
    if not 0 <= load < math.inf:
        raise ValueError(f"erlang_c: load is {load}; allowed: a finite number, 0 or more")
    if servers < 1:
        raise ValueError(f"erlang_c: servers is {servers}; allowed: 1 or more")
    if load >= servers:
        return 1.0
    blocked = _erlang_b(load, servers)
    return blocked / (1 - load / servers * (1 - blocked))


def mean_wait(load: float, servers: int) -> float:
    """Mean wait of M/M/c before service, in service times; infinite where the servers can not keep up."""
    return erlang_c(load, servers) / (servers - load) if load < servers else math.inf


def servers_for(load: float, *, wait: float, share: float, utilization: float, most: int) -> int:
    """The fewest servers that are busy at most `utilization` of the time and let `share` of requests wait over `wait`.

    wait: in service times, 0 or more. For large loads, and where waiting binds, that is load + β √load: square-root
    staffing (Halfin and Whitt, "Heavy-traffic limits for queues with many exponential servers", Operations Research 29,
    1981). At most `most`, 0 for a load of 0. One pass of load / utilization steps.
    """
    if load <= 0:
        return 0
    blocked = 1.0
    for servers in range(1, most):
        blocked = load * blocked / (servers + load * blocked)
        if servers <= load or servers * utilization < load:
            continue
        waiting = blocked / (1 - load / servers * (1 - blocked))
        if waiting * math.exp(-(servers - load) * wait) <= share:
            return servers
    return most
