"""Recording the launches of one call and repeating them without Python in between."""
