"""The tile sweep and its candidates."""
