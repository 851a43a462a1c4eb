"""Evaluation of checkpoints on suites of data sets: sampling that resumes, scores with intervals, tables and plots."""
