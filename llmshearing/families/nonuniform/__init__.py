"""Models whose layers differ in size: a config and a model for each family, registered with transformers' Auto classes.

No network is written here: each layer is the family's own, made with the config as that layer sees it.
"""
