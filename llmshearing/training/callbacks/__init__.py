"""What Composer calls during a run: pruning, domain mixture, losses by domain, and what a checkpoint says of itself."""
