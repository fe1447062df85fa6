"""Mind Atlas, the library: from text to a dictionary of features, and every question a person asks of it.

Knows nothing of Dagster. Stages meet through artifacts (`sae_core.artifacts`), not by calling one another.
Nothing heavy is imported here: `import sae_core` and `sae_core.study` must stay quick.
"""
