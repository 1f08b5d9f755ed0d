"""The secure sum: what a hospital encrypts, what the aggregator adds, what hospitals decrypt together.

`public`, `masks` and `opening` need no secret and are what the centre imports; `secret`, `member`, `epoch` and `sealed`
run in hospitals only.
"""
