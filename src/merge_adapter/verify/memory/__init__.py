"""Weights that stay where they lie: mapped from the disk, read in row blocks, computed with in fp32, let go."""
