"""Semi-supervised objectives: each trains a classifier on a few labelled and many unlabelled
records.
"""
