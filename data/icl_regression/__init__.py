"""Prompts for in-context regression: the random numbers, the tasks, the pool, the curriculum, the baselines."""
