"""From rows to a leaderboard: means, paired tests, ranks, pictures."""
