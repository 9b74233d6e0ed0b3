"""One run in several processes: who they are, what they tell each other, the sum of gradients."""
