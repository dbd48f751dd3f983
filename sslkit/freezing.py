"""Modules of a backbone that keep what they begin with."""
