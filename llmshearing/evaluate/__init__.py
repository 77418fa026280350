"""Judge models: perplexity, tasks, cost and speed, side by side."""
