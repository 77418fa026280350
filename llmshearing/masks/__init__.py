"""Learned L0 masks: the hard concrete distribution, the Lagrangian penalty, and the module that holds them."""
