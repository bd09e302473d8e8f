"""The whole training step beside other implementations: time, breakdown, memory, start-up, decoding."""
