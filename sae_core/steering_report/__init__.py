"""What steering does, measured: features chosen by rule, against controls, with the failures kept.

Half the prompts choose each feature's strength, the other half report. The controls, at the same strength: the model
as it is, a random direction as far as the feature goes, another feature, and words that ask for the concept.

The judge is lexical: the share of a text's tokens that are words of the feature's own, those that its direction
promotes and those that it often fires on, when they are rare in the corpus. It knows no synonyms, and no sense.
"""

from sae_core.steering_report.build import MARKDOWN, build_steering_report
from sae_core.steering_report.rows import Row, read_report

__all__ = ["MARKDOWN", "Row", "build_steering_report", "read_report"]
