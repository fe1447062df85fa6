"""What features say of concepts that a safety team asks for, and what they do not.

concepts     the catalog of concepts: what each is about, and where its prompts come from
drawing      prompts from real text, seeded generators and sentences with slots
baselines    a linear probe, a bag of words, random features
audit        the stage: for each concept its best features, judged on unseen prompts, beside the baselines
report       the audit in words
behaviors    what steering with the audit's features does to a few behaviors, against controls
monitor      alerts on a stream of text, at a chosen rate of false alarms
"""
