"""Pure types and rules of the hospital node."""
