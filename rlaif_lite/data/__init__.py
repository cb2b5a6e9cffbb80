"""Records, the readers of the formats people have, and the synthetic world."""
