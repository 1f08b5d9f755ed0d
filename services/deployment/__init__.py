"""What a deployment on Kubernetes does once: databases, secrets, a check. Run by the chart's Jobs, from any image."""
