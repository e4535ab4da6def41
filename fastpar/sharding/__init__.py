"""From a captured program to layouts: what to split (backward), and how it spreads (forward)."""
