"""What a training loop asks in every step: ``walks.py`` answers from memory, ``early.py`` early."""
