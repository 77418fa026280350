"""MDS directories: their index and shards read as foreign input, local or remote, and the manifest of prepared data."""
