"""What steering does, measured: features chosen by rule, against controls, with the failures kept.

Half the prompts choose features and strengths, the other half report. The controls, at the same strength: the model as
it is, a random direction as far as the feature goes, another feature, and words that ask for the concept.

Three judges. The lexical one is the share of a text's tokens that are words of the feature's own, those that its
direction promotes and those that it often fires on, when they are rare in the corpus: it knows no synonyms, and no
sense. The second is how near a text is to the feature's label, by a sentence-embedding model: weak, but it
asks nobody. The third is a language model, where one judges the study's labels.
"""

from sae_core.steering_report.build import Made, build_steering_report
from sae_core.steering_report.rows import Row, read_report

__all__ = ["Made", "Row", "build_steering_report", "read_report"]
