"""Decoders composed from a specification, and the families that fill one in."""
