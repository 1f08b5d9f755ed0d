"""`make chaos`: replicas and failover with real processes on one machine, under load, with a ledger of truth."""
