"""Every operator beside its peers: cases, peers, measurement harness, run."""
