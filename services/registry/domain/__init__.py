"""What the registry knows and the rules it keeps: pure types and functions."""
