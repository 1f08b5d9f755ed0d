"""What a plan's model gains or loses with epsilon: its curve, simulated on public or synthetic data."""
