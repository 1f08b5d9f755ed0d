"""PostgreSQL and Redis as plain processes, a local certificate authority, and supervision of child processes.

Everything here runs without root and without containers, and tolerates root: store processes then run as `nobody`.
"""
