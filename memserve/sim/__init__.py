"""`memserve simulate`: the global scheduler, driven by virtual time over simulated instances."""
