"""The report of a run: one HTML file with its curves and its rollouts, token by token."""
