"""Pure rules of the log: what an event may be, and how a batch of them extends the tree."""
