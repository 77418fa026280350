"""Surviving: resuming, saving, watching other ranks, stopping on signals, and refusing poisoned batches."""
