"""The audit service: an append-only Merkle log with signed checkpoints and proofs."""
