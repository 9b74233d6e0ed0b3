"""Does it learn? Adapters compared on bases pretrained here, and on tasks made from packages."""
