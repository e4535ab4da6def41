"""Published latencies of diffusion models on one and more GPUs, and how near the predictions come to them.

``rows.csv``: a latency each, with its source; ``ratios.csv``: where only a ratio of two plans is published.
"""
