"""The secure sum: what a hospital encrypts, what the aggregator adds, what hospitals decrypt together.

`public` needs no key and is all that an aggregator imports; `secret` holds the key side and runs in hospitals only.
"""
