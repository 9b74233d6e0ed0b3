"""How good a model is: log-likelihoods, multiple choice, tasks of lm-evaluation-harness."""
