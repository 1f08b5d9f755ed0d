"""What the node does with each kind of task, and in which order."""
