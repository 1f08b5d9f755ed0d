"""How calls, uploads, the audit log and idle hospitals load a stack, and what each costs.

Locust's users say when a call is due (`locustfile`, run by `headless` or by Locust's own command); one asyncio process
with fedmesh's clients drives an embedded stack and makes the calls (`driver`); see ADR 50. It is an open loop, as in
`make chaos`, whose mix of calls it takes: latency counts from when a call was due. What passes or fails is judged by
the exact samples, for Locust rounds its percentiles.
"""
