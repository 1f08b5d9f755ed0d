"""gRPC servers and clients: mutual TLS, access policy, deadlines, errors, telemetry."""
