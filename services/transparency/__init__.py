"""Transparency log: Merkle tree and proofs, signed checkpoints, exports and their offline verifier."""
