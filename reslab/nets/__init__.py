"""Nets: Spec -> torch modules, and the weights of others."""
