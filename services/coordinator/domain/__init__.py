"""The round state machine: pure types and rules."""
