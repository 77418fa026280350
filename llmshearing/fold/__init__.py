"""Cut, and run small: what a pruner chose (`selection`), the one fold, and gating inside a running model."""
