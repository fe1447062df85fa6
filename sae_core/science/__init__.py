"""What is known of dictionaries as a kind: how they scale, and which of the papers' findings hold for these.

laws        power laws fitted to runs, with intervals by resampled residuals
scaling     the sweep of short runs, and the laws that it follows
planning    how large a dictionary a budget is best spent on, on this machine
"""
