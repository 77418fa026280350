"""The domain mixture: proportions, the order of samples, the data set and the loaders that the trainer reads."""
