"""MLflow: runs, what waits while the server is away, the registry, pictures."""
