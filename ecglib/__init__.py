"""Models, adaptation, simulation and evaluation for the study of label-efficient 12-lead ECG
learning.
"""
