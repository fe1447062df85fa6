"""Dagster assets, one module a stage: read through a resource, call one `sae_core` function, return metadata.

What belongs here: partitions, resources, checks, metadata. What does not: anything that computes; that is `sae_core`.
"""
