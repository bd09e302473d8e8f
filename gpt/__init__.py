"""The model and everything done with one: train, generate, evaluate, import, export, and the command line."""
