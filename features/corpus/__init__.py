"""What is to be learned from: manifests, the tasks in them, and what would spoil a run."""
