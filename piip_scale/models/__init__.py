"""The PIIP network: branches, interactions, merging, pyramid."""
