"""Tables and figures made from kept runs, each figure beside the analysis that it draws."""
