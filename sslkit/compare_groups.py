"""Runs that differ in their seed alone, as one curve with its spread."""
