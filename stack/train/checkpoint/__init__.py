"""Checkpoints: asynchronous, durable, checked, and readable on any mesh by any number of processes.

A run's place of checkpoints has a folder per step, named by the step. In it are files of raw array pieces,
written by every process, and last of all the manifest that makes it a checkpoint: see `manifest`.
"""
