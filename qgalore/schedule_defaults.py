"""What keys of the refresh schedule stand for when they are not given, for all who ask: keys, optimizer, reports."""

# The cos_threshold of a policy that reads one. That of overlap was measured (docs/lab/first_edition.md), the others
# are published.
THRESHOLDS = {"overlap": 0.2, "first_vector": 0.4, "signed_cosine": 0.4}


def longest_gap(update_proj_gap: int) -> int:
    """The limit of a gap that grows, in optimizer steps: four doublings. Ours; Q-GaLore names no limit."""
    return 16 * update_proj_gap
