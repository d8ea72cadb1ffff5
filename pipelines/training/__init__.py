"""What learns: the loaders, one worker's part, checkpoints, a run's folder, trained models on disk."""
