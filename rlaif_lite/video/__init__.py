"""Video in, pruned features out: decode (frames with timestamps), prune (fewer tokens), cache (each video once)."""
