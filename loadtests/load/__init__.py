"""How calls, uploads, the audit log and idle hospitals load a stack, and what each costs.

Locust keeps the statistics, real asyncio clients make the calls. Locust patches the standard library for gevent when
it is imported, and grpc.aio needs an asyncio event loop: the two do not share a process. grpc's gevent support has no
grpc.aio, so it would measure another client than the one that hospitals use. So one asyncio process drives an embedded
stack and hands every finished call to a Locust process, which fires Locust's `request` event and prints its tables.
What passes or fails is judged by the exact samples, for Locust rounds its percentiles.

It is an open loop, as in `make chaos`, whose mix of calls it takes: latency counts from when a call was due.
"""
