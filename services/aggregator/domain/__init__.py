"""Pure types and rules of sums."""
