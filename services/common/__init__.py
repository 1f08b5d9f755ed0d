"""What every service shares: errors, configuration, identity, gRPC, telemetry and store access."""
