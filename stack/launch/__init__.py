"""Runs on clusters: jobs for Kubernetes, Azure ML and Slurm are written, on Ray they are started."""
