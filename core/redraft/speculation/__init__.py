"""Proposers, verification, the speculative step and the length controller."""
