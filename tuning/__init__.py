"""Search over budgets and loss weights: Ray Tune and Optuna over the function that trains."""
