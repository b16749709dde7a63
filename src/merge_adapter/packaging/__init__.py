"""What belongs beside merged weights: which files, from whom, and what has to be edited in them."""
