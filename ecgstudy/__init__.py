"""What makes these a study: runs that are kept, the arms that are compared, and their tables and
figures.
"""
