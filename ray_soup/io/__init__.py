"""Files and bytes: storage, caches, checkpoints, sweeps, downloads and leases. Imports ray_soup.errors only."""
