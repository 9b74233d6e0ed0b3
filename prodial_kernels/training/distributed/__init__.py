"""One run in several processes: who they are, what they tell each other, the sum of gradients.

``launch.py`` (which process this is), ``world.py`` (what processes tell each other), ``life.py``
(is one still there), ``gradients.py`` (their sum), ``replicas.py`` (are all the same);
``sharding.py`` divides frozen weights: ``divided.py`` (what of a block is where), ``gathering.py``
(how it comes together).
"""
