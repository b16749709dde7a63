"""Row changes carried out over one tensor, block by block."""
