"""A projector's two large products on fp8 tensor cores: ``compute="fp8"``."""
