"""What rules that skip V rows cost: perplexity, divergence, agreement and retrieval at equal rows read."""
