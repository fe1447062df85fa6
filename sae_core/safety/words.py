"""What is said wherever the audit is shown."""

CAVEATS = """What these numbers do not show: a feature that is silent proves nothing, as a model may carry the same
content in other features, or in what the dictionary leaves unexplained. That a feature exists does not make a model
dangerous: any model that can read about a thing represents it. An AUC says that a number tells these prompts apart, not
what the feature means, and not that the model acts on it: an output score says whether turning it up moves the next
words, and the report on behaviors measures a few."""
